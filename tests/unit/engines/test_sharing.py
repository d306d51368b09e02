"""Rows of a prompt are fetched once and shared, but only with proof from each answer that they are its own."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest

from roll_r3.batch.routes import RoutedExperts
from roll_r3.batch.trajectory import Trajectory
from roll_r3.config.sampling_settings import Sampling
from roll_r3.engines.sample import Sample, SampleError, SampleRequest
from roll_r3.engines.sharing import PromptSharing
from roll_r3.engines.slots import Slots
from roll_r3.errors import EngineError, RouteError
from roll_r3.strategies.base import GenerateRequest

PROMPT = tuple(range(100))
ROWS = len(PROMPT) - 1
SAMPLING = Sampling(max_new_tokens=8)
GROUP = GenerateRequest(PROMPT, ("a", "b", "c", "d"), (10, 11, 12, 13), "group", SAMPLING, record_routes=True)


def all_rows(seed: int, response: int) -> np.ndarray:
    """Return [2 layers, prompt + response - 1 rows, 2]: prompt rows equal for all, the others the sample's own."""
    rows = ROWS + response
    ids_MRK = np.stack([np.arange(rows) % 64, 64 + np.arange(rows) % 64], -1)[None].repeat(2, 0)
    ids_MRK[:, ROWS:] += seed
    return ids_MRK.astype(np.uint8)


def whole(sample_id: str, seed: int, first_row: int = 0, version: int = 0) -> Trajectory:
    response = seed - 8
    return Trajectory.one_turn(
        sample_id,
        "group",
        prompt_ids=PROMPT,
        response_ids=np.full(response, seed),
        log_probs=np.full(response, -1.0),
        version=version,
        finish_reason="stop",
        routes=RoutedExperts(all_rows(seed, response)[:, first_row:]).after_unknown(first_row),
    )


async def turns(count: int) -> None:
    """Wait for turns of the event loop: a measure of time independent of the machine's load."""
    for _ in range(count):
        await asyncio.sleep(0)


class Engine:
    """Engine with answers after a number of turns equal to the seed; an entry of `answers` replaces a sample."""

    def __init__(self, slots: int = 8) -> None:
        self.log: list[tuple[str, str]] = []
        self.wanted: dict[str, SampleRequest] = {}
        self.answered: dict[str, Trajectory] = {}
        self.answers: dict[str, bool | Exception] = {}
        self.prime_fails: Exception | None = None
        self.keys: set[str] = set()
        self.held: Callable[[], None] = lambda: None
        self.preempted: set[str] = set()
        self.preemptions = 0
        self.silent = False
        self.sharing = PromptSharing(self.ask, self.prime, self.recomputed, Slots(slots), running_requests=slots)
        self.sharing.engine_keeps(1)

    async def prime(self, wanted: SampleRequest) -> None:
        self.log.append(("prime", wanted.sample_id))
        await turns(100)
        if self.prime_fails:
            raise self.prime_fails
        self.keys.add(wanted.cache_key)

    async def recomputed(self) -> int:
        if self.silent and self.wanted:
            raise SampleError("HTTP 404")
        return self.preemptions

    async def ask(self, wanted: SampleRequest) -> Sample:
        assert wanted.cache_key in self.keys, "the prompt must be there first"
        self.log.append(("ask", wanted.sample_id))
        self.wanted[wanted.sample_id] = wanted
        await turns(50 * (wanted.seed - 9))
        self.log.append(("answer", wanted.sample_id))
        self.preemptions += wanted.sample_id in self.preempted
        answer = self.answers.get(wanted.sample_id, True)
        if isinstance(answer, Exception):
            raise answer
        self.answered[wanted.sample_id] = whole(wanted.sample_id, wanted.seed, wanted.first_row)
        return Sample(self.answered[wanted.sample_id], from_cache=answer)

    def share(self, *requests: GenerateRequest) -> list[dict[str, Trajectory]]:
        async def work() -> list[dict[str, Trajectory]]:
            return await asyncio.gather(
                *(self.sharing.share(request, self.sharing.shareable_rows(request)) for request in requests)
            )

        came = asyncio.run(work())
        assert self.sharing._slots.free == self.sharing._slots.total, "every slot is given back"
        assert self.sharing._ahead.free == self.sharing._ahead.total
        return came


def test_the_leader_fetches_all_rows_and_the_others_their_own() -> None:
    engine = Engine()
    (came,) = engine.share(GROUP)
    assert engine.log[0] == ("prime", "a")
    assert [(engine.wanted[s].first_row, engine.wanted[s].cached_rows) for s in "abcd"] == [
        (0, ROWS),
        (ROWS, ROWS),
        (ROWS, ROWS),
        (ROWS, ROWS),
    ]
    assert len({engine.wanted[s].cache_key for s in "abcd"}) == 1
    for sample_id, seed in zip(GROUP.sample_ids, GROUP.seeds, strict=True):
        t = came[sample_id]
        assert t.response_ids.tolist() == [seed] * (seed - 8)
        np.testing.assert_array_equal(t.routes.ids_MRK, all_rows(seed, seed - 8))
        assert t.routes.known_R is None
        held = engine.answered[sample_id].routes
        assert isinstance(held, RoutedExperts)
        assert np.shares_memory(t.routes.ids_MRK, held.ids_MRK), "rows are held once, however long the prompt"


def test_every_group_has_a_key_of_its_own_even_of_the_same_prompt() -> None:
    engine = Engine()
    twin = GenerateRequest(PROMPT, ("e", "f"), (10, 11), "group", SAMPLING, record_routes=True)
    first, second = engine.share(GROUP, twin)
    assert set(first) == {"a", "b", "c", "d"} and set(second) == {"e", "f"}
    assert len({engine.wanted[s].cache_key for s in "abcdef"}) == 2


IN_DOUBT = {
    "another computed the prompt again": {"b": False},
    "the last one did": {"d": False},
    "another did not come back": {"b": SampleError("HTTP 500")},
    "another broke the contract": {"c": RouteError("an expert twice")},
}


@pytest.mark.parametrize("answers", IN_DOUBT.values(), ids=IN_DOUBT)
def test_of_a_group_in_doubt_only_the_leader_is_kept(answers: dict[str, bool | Exception]) -> None:
    engine = Engine()
    engine.answers = answers
    (came,) = engine.share(GROUP)
    assert set(came) == {"a"}
    np.testing.assert_array_equal(came["a"].routes.ids_MRK, all_rows(10, 2))


def test_a_group_among_which_the_engine_computed_anything_again_is_in_doubt() -> None:
    """Doubt the group even if every answer reports its prompt in the cache."""
    engine = Engine()
    engine.preempted = {"d"}
    assert [set(came) for came in engine.share(GROUP)] == [{"a"}]
    assert engine.sharing.shareable_rows(GROUP) == 0, "and nothing is shared for a while"
    engine = Engine()
    engine.silent = True
    assert [set(came) for came in engine.share(GROUP)] == [{"a"}]


def test_a_group_among_which_the_weights_changed_is_in_doubt(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Engine()
    ask = engine.ask

    async def newer(wanted: SampleRequest) -> Sample:
        sample = await ask(wanted)
        if wanted.sample_id != "c":
            return sample
        return replace(sample, trajectory=whole("c", wanted.seed, wanted.first_row, version=1))

    monkeypatch.setattr(engine.sharing, "_ask", newer)
    assert [set(came) for came in engine.share(GROUP)] == [{"a"}]


def test_no_more_samples_wait_in_the_engine_than_it_decodes_at_once() -> None:
    engine = Engine(slots=8)
    engine.sharing = PromptSharing(engine.ask, engine.prime, engine.recomputed, Slots(8), running_requests=4)
    engine.sharing.engine_keeps(1)
    twin = GenerateRequest(PROMPT, ("e", "f", "g", "h"), (10, 11, 12, 13), "group", SAMPLING, record_routes=True)
    engine.share(GROUP, twin)
    asked = answered = 0
    for kind, _ in engine.log:
        asked += kind == "ask"
        answered += kind == "answer"
        assert asked - answered <= 4


def test_a_leader_that_computed_the_prompt_again_has_rows_for_itself_only() -> None:
    engine = Engine()
    engine.answers = {"a": False}
    assert [set(came) for came in engine.share(GROUP)] == [{"a"}]
    assert engine.log.count(("answer", "d")) == 0, "those in doubt are not waited for"


def test_without_a_leader_nothing_is_kept() -> None:
    engine = Engine()
    engine.answers = {"a": SampleError("aborted")}
    assert engine.share(GROUP) == [{}]
    engine.answers = {"a": SampleError("aborted"), "b": SampleError("aborted")}
    late_leader = GenerateRequest(PROMPT, GROUP.sample_ids, (13, 10, 11, 12), "group", SAMPLING, record_routes=True)
    assert engine.share(late_leader) == [{}]


def test_a_leader_that_comes_late_is_waited_for() -> None:
    engine = Engine()
    engine.answers = {"b": False}
    (came,) = engine.share(
        GenerateRequest(PROMPT, GROUP.sample_ids, (13, 10, 11, 12), "group", SAMPLING, record_routes=True)
    )
    assert set(came) == {"a"}
    assert [name for kind, name in engine.log if kind == "answer"] == ["b", "a"], "those in doubt are ended at once"


@pytest.mark.parametrize("error", [SampleError("HTTP 500"), RouteError("infinite")])
def test_a_prompt_that_does_not_get_into_the_cache_is_asked_for_by_nobody(error: Exception) -> None:
    engine = Engine()
    engine.prime_fails = error
    with pytest.raises(SampleError, match=str(error)):
        engine.share(GROUP)
    assert engine.wanted == {}
    assert engine.sharing._ahead.free == engine.sharing._ahead.total


@pytest.mark.parametrize(("dies", "kept"), [("a", set()), ("b", {"a"}), ("d", {"a"})])
def test_of_a_group_whose_engine_died_only_the_leader_is_kept(dies: str, kept: set[str]) -> None:
    """Keep only the leader: the others' first rows equal its rows only after all of them have answered."""
    engine = Engine()
    engine.answers = {dies: EngineError("died")}
    (came,) = engine.share(GROUP)
    assert set(came) == kept
    assert engine.sharing._ahead.free == engine.sharing._ahead.total
    assert engine.sharing.shareable_rows(GROUP), "its cache lost nothing"


def test_a_prompt_that_met_a_dead_engine_is_asked_for_by_nobody() -> None:
    engine = Engine()
    engine.prime_fails = EngineError("died")
    with pytest.raises(EngineError, match="died"):
        engine.share(GROUP)
    assert engine.wanted == {}
    assert engine.sharing._ahead.free == engine.sharing._ahead.total


def test_samples_of_a_prompt_in_the_cache_go_before_other_prompts() -> None:
    """Prevent a computation of all prompts first: the cache would have to hold them all."""
    engine = Engine(slots=2)
    groups = [
        GenerateRequest(PROMPT, (f"{n}0", f"{n}1", f"{n}2"), (10, 11, 12), "group", SAMPLING, record_routes=True)
        for n in range(4)
    ]
    for request, came in zip(groups, engine.share(*groups), strict=True):
        assert tuple(came) == request.sample_ids
    starts = [event for event in engine.log if event[0] != "answer"]
    assert starts[:4] == [("prime", "00"), ("ask", "00"), ("ask", "01"), ("ask", "02")]
    primes = [number for number, (kind, _) in enumerate(starts) if kind == "prime"]
    assert len(primes) == 4
    for group, prime in enumerate(primes):
        begun = sum(kind == "ask" for kind, _ in starts[:prime])
        assert begun >= 3 * group - 2, "at most the last sample or two of the group before are still to begin"


def test_samples_of_a_prompt_in_the_cache_go_before_those_that_fetch_their_own() -> None:
    engine = Engine(slots=1)

    async def alone(number: int) -> None:
        async with engine.sharing._slots.hold():
            engine.log.append(("alone", str(number)))
            await turns(10)

    async def work() -> None:
        sharing = asyncio.create_task(
            engine.sharing.share(
                GenerateRequest(PROMPT, ("a", "b"), (10, 11), "group", SAMPLING, record_routes=True), ROWS
            )
        )
        await turns(20)
        await asyncio.gather(sharing, *(alone(number) for number in range(3)))

    asyncio.run(work())
    begun = [name for kind, name in engine.log if kind != "answer"]
    assert begun == ["a", "0", "a", "b", "1", "2"], "the prompt, one who found the slot free, the samples, the others"


def test_only_groups_with_something_to_share_share() -> None:
    sharing = Engine().sharing

    def rows(length: int, samples: int = 2) -> int:
        names = tuple(str(n) for n in range(samples))
        return sharing.shareable_rows(
            GenerateRequest((1,) * length, names, tuple(range(samples)), "group", SAMPLING, record_routes=True)
        )

    assert (rows(65), rows(300), rows(300, samples=1)) == (64, 299, 0)
    assert rows(64) == 0, "too short"
    assert sharing.shareable_rows(replace(GROUP, record_routes=False)) == 0
    sharing.engine_keeps(32)
    assert (rows(300), rows(289), rows(288), rows(65), rows(64)) == (288, 288, 256, 64, 0)
    sharing.engine_keeps(0)
    assert rows(300) == 0


def test_after_a_loss_nothing_is_shared_for_longer_and_longer(caplog: pytest.LogCaptureFixture) -> None:
    engine = Engine()
    sharing = engine.sharing
    engine.answers = {"b": False, "c": False}

    def updates_until_shared() -> int:
        count = 0
        while not sharing.shareable_rows(GROUP):
            sharing.weights_changed()
            count += 1
        return count

    with caplog.at_level(logging.WARNING):
        engine.share(GROUP)
    assert len(caplog.records) == 1 and "max_total_tokens" in caplog.text
    pauses = [updates_until_shared()]
    for _ in range(8):
        engine.share(GROUP)
        pauses.append(updates_until_shared())
    assert pauses == [1, 2, 4, 8, 16, 32, 64, 64, 64]
    sharing.weights_changed()  # a whole step without a loss
    engine.share(GROUP)
    assert updates_until_shared() == 1


def test_a_failure_that_is_not_the_caches_pauses_nothing() -> None:
    engine = Engine()
    engine.answers = {"b": SampleError("HTTP 500")}
    engine.share(GROUP)
    assert engine.sharing.shareable_rows(GROUP) == ROWS
