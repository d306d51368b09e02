"""The groups of a step: sampled by the pool, scored as they come, filtered by their scores.

A step draws prompts from each part of the data until the part has its number of groups. So without filters and
additional prompts, its groups are those of the next prompts. A group dropped by a filter is replaced by the next
prompt: the groups of a step follow from the scores, not from time. With additional prompts the first groups to finish
are taken. The others are aborted, and their prompts are drawn first in the next step.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import dataclass, field, replace

import numpy as np

from roll_r3.algorithms.group_filter import passes
from roll_r3.algorithms.signal import group_signal
from roll_r3.cluster.engine_pool import Completed, EnginePool, Ticket
from roll_r3.config.derived import group_filter
from roll_r3.config.pipeline import RLVRConfig
from roll_r3.config.sections import GroupFilter
from roll_r3.config.shares import section_sizes
from roll_r3.data.draws import Part, PromptSource
from roll_r3.data.prompts import Prompt
from roll_r3.pipelines.experience import Collected, Decoder, ScoredGroup, response_of
from roll_r3.pipelines.group_requests import GroupRequests
from roll_r3.rewards.scoring import Answer, Rewards

_SCORES_S = 0.05
"""Seconds between two looks for scores, while samples are waited for."""


@dataclass(frozen=True)
class _Drawn:
    """Prompt of the step, sampled or scored right now."""

    ticket: Ticket
    prompt: Prompt
    number: int
    """Number in the order of reading."""
    place: int
    """Place in the step's prompts of its part."""


@dataclass
class _Filling:
    """Groups of one part of the data."""

    part: Part
    requests: GroupRequests
    extra: int
    """Prompts in flight beyond the missing groups."""
    most: int
    """Largest number of prompts drawn, without the additional ones."""
    drawn: int = 0
    sampling: dict[int, _Drawn] = field(default_factory=dict)
    """Ticket's number -> prompt with its samples under way."""
    scoring: dict[Future[list[Answer]], tuple[_Drawn, ScoredGroup]] = field(default_factory=dict)
    """Sampled groups that wait for the verdict of a filter."""
    kept: list[tuple[int, ScoredGroup]] = field(default_factory=list)
    """Place in the step's prompts, and group."""
    discarded: list[tuple[int, ScoredGroup]] = field(default_factory=list)
    unused: list[_Drawn] = field(default_factory=list)

    @property
    def full(self) -> bool:
        return len(self.kept) >= self.part.size

    @property
    def wanted(self) -> int:
        """Number of prompts to draw now."""
        under_way = len(self.sampling) + len(self.scoring)
        wanted = self.part.size - len(self.kept) + self.extra - under_way
        left = self.most + self.extra - self.drawn
        if self.part.left is not None:
            left = min(left, self.part.left)
        return max(0, min(wanted, left)) if not self.full else 0


class Collector:
    """Collects the groups of each step.

    Example:
        >>> collected = collector.collect(step)     # doctest: +SKIP
        >>> [group.prompt for group in collected.groups]    # doctest: +SKIP
    """

    def __init__(
        self,
        config: RLVRConfig,
        pool: EnginePool,
        source: PromptSource,
        rewards: Rewards,
        decoder: Decoder,
        say: Callable[[str], None],
    ) -> None:
        self._config, self._pool, self._source = config, pool, source
        self._rewards, self._decoder, self._say = rewards, decoder, say
        shares = {part.name: part.size / config.rollout_batch_size for part in source.parts}
        self._extra = section_sizes(shares, config.max_additional_running_prompts)

    def collect(self, step: int) -> Collected:
        """Draw prompts, sample and score their groups, until the step has its groups or its bound is reached.

        No weight changes, so it may be interrupted anywhere. Scores may still be missing, except where a filter needed
        them.

        Raises:
            EngineError: an engine went down more often than the configuration allows in a step.
            WorkerError: a worker failed or died.
            RollError: too many responses have no reward, in a step with filters.
        """
        assert not self._pool.in_flight, "results of other requests would be taken for the step's"
        fillings = [self._begin(part, step) for part in self._source.parts if part.size]
        self._draw(fillings)
        while any(filling.sampling or filling.scoring for filling in fillings):
            self._take(fillings)
            self._end_if_failing(fillings)
            for filling in fillings:
                if filling.full:
                    self._abort(filling)
            self._draw(fillings)
        for filling in fillings:
            unused = sorted(filling.unused, key=lambda drawn: drawn.place)
            filling.part.end([drawn.number for drawn in unused])
            if not filling.full:
                self._say(f"step {step}: {self._shortfall(filling)}")
        kept = [group for filling in fillings for group in _in_order(filling.kept)]
        discarded = [group for filling in fillings for group in _in_order(filling.discarded)]
        return Collected(kept, discarded, self._source.place, self._metrics(fillings))

    def _begin(self, part: Part, step: int) -> _Filling:
        part.begin()
        most = part.size * self._config.filter_groups.max_num_gen_batches
        return _Filling(part, GroupRequests(self._config, step, part.name), self._extra[part.name], most)

    def _draw(self, fillings: Sequence[_Filling]) -> None:
        """Draw as many prompts as are missing, and submit their requests together."""
        drawn = [(filling, number) for filling in fillings for number in filling.part.draw(filling.wanted)]
        asked = [filling.requests.next(self._source.prompts[number]) for filling, number in drawn]
        for (filling, number), ticket in zip(drawn, self._pool.submit(asked), strict=True):
            place = filling.drawn
            filling.sampling[ticket.number] = _Drawn(ticket, self._source.prompts[number], number, place)
            filling.drawn += 1

    def _take(self, fillings: Sequence[_Filling]) -> None:
        """Wait for samples or scores, and settle the groups that have them."""
        scoring = [answers for filling in fillings for answers in filling.scoring]
        if self._pool.in_flight:
            for done in self._pool.completed(_SCORES_S if scoring else None):
                self._sampled(next(f for f in fillings if done.ticket.number in f.sampling), done)
        else:
            wait(scoring, return_when=FIRST_COMPLETED)
        for filling in fillings:
            for answers in [answers for answers in filling.scoring if answers.done()]:
                self._judge(filling, *filling.scoring.pop(answers))

    def _sampled(self, filling: _Filling, done: Completed) -> None:
        """Begin to score a group; it is kept at once unless a filter waits for its scores."""
        drawn = filling.sampling.pop(done.ticket.number)
        if filling.full:
            filling.unused.append(drawn)
            return
        responses = [response_of(drawn.prompt, t, self._rewards, self._decoder) for t in done.result.trajectories]
        group = ScoredGroup(drawn.prompt, done.result, responses, self._rewards.begin(responses))
        if self._filter(drawn.prompt).enable:
            filling.scoring[group.answers] = drawn, group
        else:
            filling.kept.append((drawn.place, group))

    def _judge(self, filling: _Filling, drawn: _Drawn, group: ScoredGroup) -> None:
        """Keep a scored group, or discard it; release the samples of one not kept."""
        if filling.full:
            filling.unused.append(drawn)
        elif passes(_scores(group), self._filter(drawn.prompt)):
            filling.kept.append((drawn.place, group))
        else:
            released = replace(group, result=replace(group.result, trajectories=()))
            filling.discarded.append((drawn.place, released))

    def _end_if_failing(self, fillings: Sequence[_Filling]) -> None:
        """Raise RollError if rules fail on as many responses as a step has: new prompts would not help."""
        judged = [group for filling in fillings for _, group in filling.discarded]
        if not judged:
            return
        judged += [g for f in fillings for _, g in f.kept if self._filter(g.prompt).enable]
        answers = [answer for group in judged for answer in group.answers.result()]
        failed = sum(answer.score is None for answer in answers)
        if failed > int(self._config.max_failed_rewards * max(len(answers), self._config.samples_per_step)):
            self._rewards.accept([response for group in judged for response in group.responses], answers)

    def _abort(self, filling: _Filling) -> None:
        """Give up the prompts under way of a part with all its groups."""
        self._pool.abort([drawn.ticket for drawn in filling.sampling.values()])
        filling.unused += [*filling.sampling.values(), *(drawn for drawn, _ in filling.scoring.values())]
        for answers in filling.scoring:
            answers.cancel()
        filling.sampling.clear()
        filling.scoring.clear()

    def _filter(self, prompt: Prompt) -> GroupFilter:
        return group_filter(self._config, self._rewards.section_of(prompt.domain))

    def _shortfall(self, filling: _Filling) -> str:
        """Say that a part has fewer groups than wanted."""
        name = f" of {filling.part.name}" if filling.part.name else ""
        bound = f"filter_groups.max_num_gen_batches: {self._config.filter_groups.max_num_gen_batches}"
        if filling.part.left == 0:
            bound = "all prompts of the data"
        return (
            f"{len(filling.kept)} of {filling.part.size} groups{name} passed the filter after {filling.drawn} prompts "
            f"({bound}): the step is smaller"
        )

    def _metrics(self, fillings: Sequence[_Filling]) -> dict[str, float]:
        """Return the figures of filters and additional prompts, where they are in use."""
        metrics: dict[str, float] = {}
        judged = [g for f in fillings for _, g in (*f.kept, *f.discarded) if self._filter(g.prompt).enable]
        if judged:
            pairs = [(score, str(i)) for i, group in enumerate(judged) for score in _scores(group)]
            signal = group_signal(np.array([score for score, _ in pairs]), [group for _, group in pairs])
            drawn = sum(filling.drawn for filling in fillings)
            metrics = {
                "rollout/filter_sampled_groups": len(judged),
                "rollout/filter_kept_groups": len(judged) - sum(len(f.discarded) for f in fillings),
                "rollout/filter_all_right": signal["reward/groups_all_right"],
                "rollout/filter_all_wrong": signal["reward/groups_all_wrong"],
                "rollout/filter_rounds": drawn / self._config.rollout_batch_size,
            }
        if self._config.max_additional_running_prompts:
            metrics["rollout/aborted_groups"] = sum(len(filling.unused) for filling in fillings)
        return metrics


def _scores(group: ScoredGroup) -> list[float]:
    """Return the scores of a group with its answers; failed rules give none."""
    return [answer.score for answer in group.answers.result() if answer.score is not None]


def _in_order(groups: Sequence[tuple[int, ScoredGroup]]) -> list[ScoredGroup]:
    """Return groups in the order in which their prompts were drawn."""
    return [group for _, group in sorted(groups, key=lambda pair: pair[0])]
