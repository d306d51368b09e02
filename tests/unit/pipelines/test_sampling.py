"""Groups of a step: filters, additional prompts and sections, in front of a pool and rewards under control."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any

import numpy as np
import pytest

from roll_r3.batch.trajectory import Trajectory
from roll_r3.cluster.engine_pool import Completed, Ticket
from roll_r3.config.pipeline import RLVRConfig
from roll_r3.data.draws import NOWHERE, Place, PromptSource, prompt_source
from roll_r3.data.prompts import Prompt
from roll_r3.errors import RollError
from roll_r3.pipelines.experience import Collected
from roll_r3.pipelines.lifecycle.places import place_of, placed
from roll_r3.pipelines.sampling import Collector
from roll_r3.rewards.functions import Response
from roll_r3.rewards.scoring import Answer
from roll_r3.saving.state import Data
from roll_r3.strategies.base import GenerateRequest, GenerateResult

GROUP = 4


def prompts_of(verdicts: str) -> list[Prompt]:
    """Return a prompt per character: `l`ive (its samples score 0 and 1), `r`ight or `w`rong."""
    return [Prompt(f"{i}{v}", v, (i,), "", domain="ab"[i % 2]) for i, v in enumerate(verdicts)]


class Engines:
    """A pool and rewards at once: groups and scores end in a random order, or in a given one.

    Every prompt is known by its only token, its number.
    """

    def __init__(
        self, prompts: Sequence[Prompt], seed: int, quick: Callable[[int], bool] = lambda number: True
    ) -> None:
        self._prompts, self._draw, self._quick = prompts, random.Random(seed), quick
        self.requests: list[GenerateRequest] = []
        self.aborted: list[int] = []
        self.scored: Counter[str] = Counter()
        self.most_in_flight = 0
        self._waiting: list[Ticket] = []
        self._scoring: list[tuple[Future[list[Answer]], list[Answer]]] = []

    @property
    def in_flight(self) -> int:
        return len(self._waiting)

    def submit(self, requests: Sequence[GenerateRequest]) -> list[Ticket]:
        tickets = [Ticket(len(self.requests) + i, request) for i, request in enumerate(requests)]
        self.requests += requests
        self._waiting += tickets
        self.most_in_flight = max(self.most_in_flight, self.in_flight)
        return tickets

    def completed(self, timeout: float | None) -> list[Completed]:
        assert self._waiting, "nothing is waited for in vain"
        if not self.aborts:
            assert timeout or not self._scoring or not self.judged, "scores are looked for meanwhile"
        if self._scoring and self._draw.random() < 0.5:
            self._score_one()
        if timeout and self._draw.random() < 0.3:
            return []
        ready = [ticket for ticket in self._waiting if self._quick(ticket.request.prompt_ids[0])] or self._waiting
        done = self._draw.sample(ready, self._draw.randint(1, len(ready)))
        self._waiting = [ticket for ticket in self._waiting if ticket not in done]
        self._score_all_if_idle()
        return [Completed(ticket, self._result(ticket.request)) for ticket in done]

    def abort(self, tickets: Sequence[Ticket]) -> None:
        assert all(ticket in self._waiting for ticket in tickets)
        self.aborted += [ticket.request.prompt_ids[0] for ticket in tickets]
        self._waiting = [ticket for ticket in self._waiting if ticket not in tickets]
        self._score_all_if_idle()

    def _result(self, request: GenerateRequest) -> GenerateResult:
        ids = {"prompt_ids": request.prompt_ids, "log_probs": [-1.0], "version": 0, "finish_reason": "stop"}
        return GenerateResult(
            tuple(
                Trajectory.one_turn(name, request.group_id, response_ids=[j], **ids)  # type: ignore[arg-type]
                for j, name in enumerate(request.sample_ids)
            ),
            retries=1,
        )

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool) -> str:
        return str(token_ids[0])

    def skips_special_tokens(self, domain: str) -> bool:
        return True

    def section_of(self, domain: str) -> str:
        return domain

    judged = aborts = True
    """True if filters need scores, and if the last groups are given up."""

    def begin(self, responses: Sequence[Response]) -> Future[list[Answer]]:
        scores = {"l": lambda j: j % 2, "r": lambda j: 1, "w": lambda j: 0}[responses[0].prompt]
        answers: Future[list[Answer]] = Future()
        self._scoring.append((answers, [Answer(float(scores(j)), {}) for j in range(len(responses))]))
        self._score_all_if_idle()
        return answers

    def _score_all_if_idle(self) -> None:
        while self._scoring and (not self._waiting or not self.judged):
            self._score_one()

    def _score_one(self) -> None:
        answers, found = self._scoring.pop(self._draw.randrange(len(self._scoring)))
        if answers.set_running_or_notify_cancel():
            answers.set_result(found)


def config_of(**fields: Any) -> RLVRConfig:
    roles: dict[str, Any] = {"actor_train": {}, "actor_infer": {}}
    size = {"rollout_batch_size": 4, "num_return_sequences_in_group": GROUP}
    return RLVRConfig.model_validate({"exp_name": "x", "pretrain": "p", "seed": 3, **roles, **size, **fields})


FILTER = {"filter_groups": {"enable": True}}
EXTRA = {"max_additional_running_prompts": 3}
SECTIONS = {"rewards": {name: {"reward": "math", "tag_included": [name]} for name in "ab"}}
SHARES = {"a": 0.25, "b": 0.75}


class Run:
    """Steps of a run, with its prompts drawn as the real one draws them."""

    def __init__(
        self,
        verdicts: str,
        seed: int = 0,
        place: Place = NOWHERE,
        shares: Any = None,
        **fields: Any,
    ) -> None:
        self.config, self.prompts, self.said = config_of(**fields), prompts_of(verdicts), list[str]()
        self.source: PromptSource = prompt_source(
            self.prompts, self.config.rollout_batch_size, 3, shares=shares or {}, section_of=str, place=place
        )
        self.seed = seed

    def step(self, number: int, quick: Callable[[int], bool] = lambda number: True) -> tuple[Collected, Engines]:
        engines: Any = Engines(self.prompts, self.seed + number, quick)
        engines.judged = self.config.filter_groups.enable
        engines.aborts = self.config.max_additional_running_prompts > 0
        collector = Collector(self.config, engines, self.source, engines, engines, self.said.append)
        collected = collector.collect(number)
        assert engines.in_flight == 0
        return collected, engines


def ids(collected: Collected) -> list[str]:
    return [group.prompt.prompt_id for group in collected.groups]


def samples(collected: Collected) -> list[tuple[str, int]]:
    return [(t.sample_id, t.prompt_ids[0]) for group in collected.groups for t in group.result.trajectories]


def test_without_filters_a_step_has_the_next_prompts_with_the_ids_and_seeds_of_earlier_releases() -> None:
    run, reference = Run("lrwl" * 3), np.random.default_rng((3, 0)).permutation(12)
    for step in (1, 2, 3):
        collected, engines = run.step(step)
        seeds = np.random.default_rng((3, step)).integers(1 << 31, size=(4, GROUP))
        expected = reference[4 * step - 4 : 4 * step].tolist()
        assert [group.prompt.token_ids[0] for group in collected.groups] == expected
        assert [request.prompt_ids[0] for request in engines.requests] == expected
        assert [request.seeds for request in engines.requests] == [tuple(row) for row in seeds.tolist()]
        assert samples(collected) == [
            (f"step{step}/prompt{i}/sample{j}", expected[i]) for i in range(4) for j in range(4)
        ]
        assert collected.metrics == {}
    assert run.source.place == Place(drawn=((3, 4),))


def test_a_filtered_step_has_exactly_its_number_of_live_groups_whatever_ends_first() -> None:
    verdicts = "lrwwlrlwrlwr" * 4
    found = []
    for seed in range(20):
        run = Run(verdicts, seed, **FILTER)
        steps = [run.step(step) for step in (1, 2, 3)]
        for collected, engines in steps:
            assert [name[-1] for name in ids(collected)] == ["l"] * 4
            assert len(engines.requests) == 4 + len(collected.discarded), "one prompt for each that was dropped"
            assert engines.most_in_flight <= 4
            assert engines.aborted == []
            assert all(not group.result.trajectories for group in collected.discarded), "routes are released"
        names = [
            group.prompt.prompt_id for collected, _ in steps for group in (*collected.groups, *collected.discarded)
        ]
        assert len(set(names)) == len(names) < len(verdicts), "within one pass no prompt is sampled twice"
        assert sum(count * size for count, size in run.source.place.drawn) == len(names)
        found.append([samples(collected) for collected, _ in steps])
    assert all(one == found[0] for one in found), "groups, ids and seeds do not depend on time"


def test_figures_of_a_filtered_step() -> None:
    collected, _ = Run("lrwwlrlwrlwr" * 2, **FILTER).step(1)
    drawn = len(collected.discarded) + 4
    assert collected.metrics == {
        "rollout/filter_sampled_groups": drawn,
        "rollout/filter_kept_groups": 4,
        "rollout/filter_all_right": sum(g.prompt.text == "r" for g in collected.discarded) / drawn,
        "rollout/filter_all_wrong": sum(g.prompt.text == "w" for g in collected.discarded) / drawn,
        "rollout/filter_rounds": drawn / 4,
    }
    assert 0 < collected.metrics["rollout/filter_all_right"] < 1


@pytest.mark.parametrize(("verdicts", "groups"), [("w" * 50, 0), ("l" + "w" * 8, 1)])
def test_a_step_whose_bound_is_reached_trains_on_fewer_and_says_so(verdicts: str, groups: int) -> None:
    run = Run(verdicts, filter_groups={"enable": True, "max_num_gen_batches": 3})
    collected, engines = run.step(1)
    assert [name[-1] for name in ids(collected)] == ["l"] * groups
    assert len(engines.requests) == min(12, len(verdicts)), "no prompt is sampled twice in a step"
    bound = "filter_groups.max_num_gen_batches: 3" if len(verdicts) > 12 else "all prompts of the data"
    assert run.said == [
        f"step 1: {groups} of 4 groups passed the filter after {len(engines.requests)} prompts ({bound}): the step "
        "is smaller"
    ]


def test_a_filtered_step_ends_once_a_rule_fails_everywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    def accept(_: Engines, responses: Sequence[Response], answers: Sequence[Answer]) -> None:
        raise RollError(f"{len(answers)} of {len(responses)}")

    def begin(self: Engines, responses: Sequence[Response]) -> Future[list[Answer]]:
        answers: Future[list[Answer]] = Future()
        answers.set_result([Answer(None, {}, "raised")] * len(responses))
        begun.append(answers)
        return answers

    begun: list[Future[list[Answer]]] = []
    monkeypatch.setattr(Engines, "begin", begin)
    monkeypatch.setattr(Engines, "accept", accept, raising=False)
    with pytest.raises(RollError, match=r"^(\d+) of \1$"):
        Run("l" * 40, **FILTER).step(1)
    assert len(begun) <= 4, "a whole step's number, far below the bound"


def test_additional_prompts_that_finish_late_are_aborted_and_come_first_in_the_next_step() -> None:
    run, order = Run("l" * 40, **EXTRA), np.random.default_rng((3, 0)).permutation(40).tolist()
    slow = set(order[1:3])
    collected, engines = run.step(1, quick=lambda number: number not in slow)
    assert engines.most_in_flight == 7
    used = [group.prompt.token_ids[0] for group in collected.groups]
    assert len(used) == 4 and not slow & set(used)
    rest = [number for number in order[:7] if number not in used]
    assert set(engines.aborted) <= set(rest)
    assert collected.metrics == {"rollout/aborted_groups": 3}
    assert run.source.place == collected.place == Place(drawn=((1, 7),), returned=tuple(rest))
    _, engines = run.step(2)
    assert [request.prompt_ids[0] for request in engines.requests] == [*rest, *order[7:11]]
    assert [request.group_id for request in engines.requests] == [f"step2/prompt{i}" for i in range(7)]


@pytest.mark.parametrize("fields", [EXTRA, FILTER | EXTRA, FILTER | EXTRA | SECTIONS], ids=["extra", "filter", "all"])
def test_no_prompt_is_lost_and_none_is_trained_on_twice_within_a_pass(fields: dict[str, Any]) -> None:
    shares = SHARES if "rewards" in fields else None
    for seed in range(10):
        run = Run("llrw" * 30, seed, shares=shares, **fields)
        decided: Counter[str] = Counter()
        for step in range(1, 8):
            collected, _ = run.step(step)
            decided.update(group.prompt.prompt_id for group in (*collected.groups, *collected.discarded))
            assert len(collected.groups) == 4
        place = run.source.place
        drawn = [runs for runs in (place.drawn, *(section.drawn for section in place.sections.values())) if runs]
        assert set(decided.values()) == {1}
        assert sum(count * size for runs in drawn for count, size in runs) == len(decided) + len(place.returned)


@pytest.mark.parametrize("fields", [{}, FILTER, EXTRA, FILTER | EXTRA], ids=["plain", "filter", "extra", "both"])
@pytest.mark.parametrize("shares", [None, SHARES], ids=["all", "sections"])
def test_a_resumed_run_draws_the_same_prompts(fields: dict[str, Any], shares: dict[str, float] | None) -> None:
    """Compare the requests of later steps; the data is passed over several times."""
    fields = fields | (SECTIONS if shares else {})
    whole = Run("llrw" * 5, shares=shares, **fields)
    for step in range(1, 6):
        collected, _ = whole.step(step)
    saved = placed(Data(prompts=20, sha256="0" * 64, seed=3, drawn=()), collected.place)
    place = place_of(Data.model_validate_json(saved.model_dump_json()))
    resumed = Run("llrw" * 5, shares=shares, place=place, **fields)
    for step in range(6, 12):
        asked = [engines.requests for _, engines in (run.step(step) for run in (whole, resumed))]
        assert asked[0] == asked[1]
    assert whole.source.place == resumed.source.place


def test_every_step_is_composed_by_the_shares() -> None:
    run = Run("lrwl" * 5, shares=SHARES, **SECTIONS)
    orders = []
    for step in range(1, 6):
        collected, engines = run.step(step)
        assert [group.prompt.domain for group in collected.groups] == ["a", "b", "b", "b"]
        assert len(engines.requests) == 4
        orders.append([group.prompt.prompt_id for group in collected.groups])
    assert len({order[0] for order in orders}) == 5, "each section has an order of its own"
    assert Counter(name for order in orders for name in order[1:]).most_common()[-1][1] == 1
    assert samples(collected)[0][0] == "step5/a/prompt0/sample0"


def test_a_dropped_group_is_replaced_by_a_prompt_of_its_section() -> None:
    rewards = {
        "a": {"reward": "math", "tag_included": ["a"]},
        "b": {"reward": "math", "tag_included": ["b"], "filter_groups": {"enable": True}},
    }
    run = Run("wlwrwwwl" * 4, shares=SHARES, rewards=rewards)
    collected, _ = run.step(1)
    assert [group.prompt.text for group in collected.groups] == ["w", "l", "l", "l"], "section a has no filter"
    assert {group.prompt.domain for group in collected.discarded} == {"b"}
    assert collected.metrics["rollout/filter_sampled_groups"] == len(collected.discarded) + 3
