"""The rows of a prompt's routes, fetched with one of its samples and used by all of them.

Without it every sample of a group would bring the prompt's rows over the wire, and an engine that gets the group at
once would compute the prompt once for each. So a request of one token puts the prompt into the engine's prefix cache
first. Then the samples go out together: one, the leader, fetches all its rows, the others those from `rows` on.

A row says what happened when the keys and values that a sample attended to were computed. The leader's first rows are
the others' as long as all of them found the same computation in the cache. Three things see to that:

* the group has a key of its own, under which the engine keeps its prompt apart, so that only the group's own requests
  can put the prompt there: none of another prompt that begins alike;
* each answer says how much came from the cache. If all of them found the prompt there, none computed it again; and
  where an engine throws away and computes again without saying so in the answer, it says how often it did;
* if one did not, or did not come back at all, the others may have found what that one computed. Then only the leader,
  whose rows are all its own, is kept.

Shape legend: M MoE layers, s shared rows, o a sample's own rows after them, K experts per token.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections.abc import Awaitable, Callable
from dataclasses import replace

import numpy as np

from roll_r3.batch.routes import RoutedExperts
from roll_r3.batch.trajectory import Trajectory
from roll_r3.engines.sampling import Ask, Sample, SampleError, SampleRequest
from roll_r3.engines.slots import Slots
from roll_r3.errors import EngineError, RouteError
from roll_r3.strategies.base import GenerateRequest

logger = logging.getLogger(__name__)

LEAST_ROWS = 64
"""A prompt with fewer rows is not worth a request of its own: for a tiny model on a CPU the times came out even."""
_LONGEST_PAUSE = 64

Prime = Callable[[SampleRequest], Awaitable[None]]
"""Puts a prompt into the engine's cache, under a key; raises what `Ask` does."""
Recomputed = Callable[[], Awaitable[int]]
"""How often the engine has so far thrown away what a sample had computed, without saying so in its answer; raises
SampleError."""


class PromptSharing:
    """One engine's. Implements `roll_r3.engines.sampling.Sharing`.

    An engine whose cache loses prompts before their samples begin, because it is too small for what it is asked at
    once, would have to compute whole groups twice. So after a loss nothing is shared until the weights change; after
    a loss right after that, until they changed twice, then four times, and so on.
    """

    def __init__(self, ask: Ask, prime: Prime, recomputed: Recomputed, slots: Slots, *, at_once: int) -> None:
        """
        Args:
            ask: without a slot; this takes one.
            slots: of the engine. A sample whose prompt lies in the cache goes before everything else.
            at_once: samples that the engine decodes at once. Those beyond would wait in it while their prompts lie in
                the cache, where nothing holds them.
        """
        self._ask = ask
        self._prime = prime
        self._recomputed = recomputed
        self._slots = slots
        self._ahead = Slots(min(at_once, slots.total))  # samples of groups whose prompts lie in the cache
        self._page = 0
        self._pause = 0
        self._next_pause = 1
        self._lost = False

    def engine_keeps(self, page: int) -> None:
        """The engine keeps prefixes, in whole pages of this many tokens; 0: it does not, and nothing is shared."""
        self._page = page

    def weights_changed(self) -> None:
        if not self._lost and not self._pause:
            self._next_pause = 1
        self._lost = False
        self._pause = max(0, self._pause - 1)

    def shareable_rows(self, request: GenerateRequest) -> int:
        """Whole pages before the prompt's last token, which every sample computes to get its first."""
        if not self._page or self._pause or len(request.sample_ids) < 2:
            return 0
        rows = (len(request.prompt_ids) - 1) // self._page * self._page
        return rows if rows >= LEAST_ROWS else 0

    async def share(self, request: GenerateRequest, rows: int) -> dict[str, Trajectory]:
        key = secrets.token_hex(8)
        wanted = [
            SampleRequest(request.prompt_ids, sample_id, seed, rows if number else 0, rows, key, request.group_id)
            for number, (sample_id, seed) in enumerate(zip(request.sample_ids, request.seeds, strict=True))
        ]
        ahead = min(len(wanted), self._ahead.total)
        await self._ahead.acquire(ahead)

        def ended() -> None:
            nonlocal ahead
            if ahead:
                ahead -= 1
                self._ahead.release()

        try:
            before = await self._recomputed()
            async with self._slots.hold():
                try:
                    await self._prime(replace(wanted[0], cached_rows=0))
                except RouteError as error:
                    raise SampleError(str(error)) from error
            return await self._together(wanted, rows, before, ended)
        finally:
            self._ahead.release(ahead)

    async def _together(
        self, wanted: list[SampleRequest], rows: int, before: int, ended: Callable[[], None]
    ) -> dict[str, Trajectory]:
        """The whole group, or the leader at most.

        Args:
            before: what `Recomputed` said before the prompt went into the cache.
        """
        samples = [asyncio.create_task(self._in_turn(one, ended)) for one in wanted]
        leader, *others = samples
        try:
            left = set(samples)
            while left:
                done, left = await asyncio.wait(left, return_when=asyncio.FIRST_COMPLETED)
                if reasons := [reason for task in done if (reason := self._why_not(task))]:
                    logger.info("samples %s ... are asked for anew: %s", wanted[0].sample_id, reasons[0])
                    await _end(others)
                    return await _alone(leader)
            trajectories = [task.result().trajectory for task in samples]
            if doubt := await self._doubt(trajectories, before):
                logger.info("samples %s ... are asked for anew: %s", wanted[0].sample_id, doubt)
                return await _alone(leader)
            return await asyncio.to_thread(_stitched, trajectories, rows)
        finally:
            await _end(samples)

    async def _in_turn(self, wanted: SampleRequest, ended: Callable[[], None]) -> Sample:
        async with self._slots.hold(urgent=True):
            try:
                return await self._ask(wanted)
            finally:
                ended()

    async def _doubt(self, trajectories: list[Trajectory], before: int) -> str:
        """Why answers that all found the prompt in the cache may still not belong together; empty when they do."""
        if len({trajectory.weight_versions for trajectory in trajectories}) > 1:
            return "the weights changed among them"
        try:
            if await self._recomputed() == before:
                return ""
        except SampleError as error:
            return f"the engine does not say whether it computed anything again: {error}"
        self._lose()
        return "the engine threw away and computed again what some sample had computed"

    def _why_not(self, task: asyncio.Task[Sample]) -> str:
        """Why the group cannot use the leader's rows; empty when this sample found the prompt in the cache."""
        try:
            sample = task.result()
        except (SampleError, RouteError, EngineError) as error:
            return f"one of them failed: {error}"
        if sample.from_cache:
            return ""
        self._lose()
        return "the engine's cache lost their prompt"

    def _lose(self) -> None:
        self._lost = True
        if self._pause:
            return
        self._pause, self._next_pause = self._next_pause, min(2 * self._next_pause, _LONGEST_PAUSE)
        logger.warning(
            "the engine's cache lost a prompt before all of its samples began, or an engine short of memory began a "
            "sample anew: every sample fetches its prompt's routes itself until the weights have changed %d times. "
            "More room (strategy_config.max_total_tokens) or fewer requests at once (max_concurrent_requests) help",
            self._pause,
        )


async def _alone(leader: asyncio.Task[Sample]) -> dict[str, Trajectory]:
    try:
        trajectory = (await leader).trajectory
    except (SampleError, RouteError, EngineError):
        return {}
    return {trajectory.sample_id: trajectory}


async def _end(tasks: list[asyncio.Task[Sample]]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


def _stitched(trajectories: list[Trajectory], rows: int) -> dict[str, Trajectory]:
    """Give each trajectory the first `rows` rows of the leader, which comes first and has all its own."""
    leader, *others = trajectories
    shared_MsK = _routes_of(leader).ids_MRK[:, :rows]
    whole = {leader.sample_id: leader}
    for other in others:
        own_MoK = _routes_of(other).ids_MRK[:, rows:]
        whole[other.sample_id] = replace(other, routes=RoutedExperts(np.concatenate([shared_MsK, own_MoK], axis=1)))
    return whole


def _routes_of(trajectory: Trajectory) -> RoutedExperts:
    assert isinstance(trajectory.routes, RoutedExperts), "only recorded routes are shared"
    return trajectory.routes
