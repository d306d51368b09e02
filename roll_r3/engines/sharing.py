"""Sharing of the rows of a prompt's routes: fetched with one of its samples and used by all of them.

Without sharing, every sample of a group would transfer the prompt's rows, and an engine that gets the group at once
would compute the prompt once per sample. So a request of one token puts the prompt into the engine's prefix cache
first. Then the samples go out together: one, the leader, fetches all its rows, the others fetch theirs from `rows` on.

A row records the computation of the keys and values attended to by a sample. The leader's first rows belong to the
others as well, provided all of them found the same computation in the cache. Three checks ensure this:

* The group has a cache key of its own, so only its own requests can put the prompt there. No other prompt with the
  same beginning can.
* Each answer gives the number of cached tokens. If all samples found the prompt in the cache, none recomputed it. An
  engine that discards and recomputes a sample without a note in the answer reports a count of these cases.
* If a sample did not find the prompt, or failed, the others may have found its computation. Then only the leader is
  kept, because it fetched all of its rows itself.

Shape legend: M MoE layers, R rows, s shared rows, K experts per token.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections.abc import Awaitable, Callable
from dataclasses import replace

from roll_r3.batch.routes import RoutedExperts
from roll_r3.batch.trajectory import Trajectory
from roll_r3.engines.sample import Ask, Sample, SampleError, SampleRequest, samples_of
from roll_r3.engines.slots import Slots
from roll_r3.errors import EngineError, RouteError
from roll_r3.strategies.base import GenerateRequest

logger = logging.getLogger(__name__)

LEAST_ROWS = 64
"""Fewest rows worth a request of their own: for a tiny model on a CPU both ways took equal time."""
_LONGEST_PAUSE = 64

Prime = Callable[[SampleRequest], Awaitable[None]]
"""Put a prompt into the engine's cache, under a key. Raises as `Ask`."""
Recomputed = Callable[[], Awaitable[int]]
"""Return the number of times the engine discarded and recomputed a sample without a note in its answer. Raises
SampleError."""


class PromptSharing:
    """Sharing in one engine.

    A cache too small for the requests in flight loses prompts before their samples begin, and whole groups would be
    computed twice. So after a loss nothing is shared until the weights change; after another loss right then, until
    they have changed twice, then four times, and so on.
    """

    def __init__(self, ask: Ask, prime: Prime, recomputed: Recomputed, slots: Slots, *, running_requests: int) -> None:
        """
        Args:
            ask: sends a request without taking a slot; this class takes the slot.
            slots: of the engine. A sample with its prompt in the cache goes before everything else.
            running_requests: samples that the engine decodes at once. More would wait in the engine while the cache
                may evict their prompts.
        """
        self._ask = ask
        self._prime = prime
        self._recomputed = recomputed
        self._slots = slots
        self._ahead = Slots(min(running_requests, slots.total))  # samples of groups with their prompts in the cache
        self._page = 0
        self._pause = 0
        self._next_pause = 1
        self._lost = False

    def engine_keeps(self, page: int) -> None:
        """Share prefixes in whole pages of this many tokens; 0: the engine keeps none, and nothing is shared."""
        self._page = page

    def weights_changed(self) -> None:
        """Count a weight update: a pause after a loss ends after a number of them."""
        if not self._lost and not self._pause:
            self._next_pause = 1
        self._lost = False
        self._pause = max(0, self._pause - 1)

    def shareable_rows(self, request: GenerateRequest) -> int:
        """Return the rows of the prompt that one sample can fetch for all; 0: each fetches its own.

        These are whole pages before the prompt's last token. Every sample computes that token to get its first one.
        """
        if not request.record_routes or not self._page or self._pause or len(request.sample_ids) < 2:
            return 0
        rows = (len(request.prompt_ids) - 1) // self._page * self._page
        return rows if rows >= LEAST_ROWS else 0

    async def share(self, request: GenerateRequest, rows: int) -> dict[str, Trajectory]:
        """Request every sample once, and the prompt's first `rows` rows with only one of them.

        Returns:
            Sample id -> the sample with all its rows. Missing samples were requested and must be requested again.

        Raises:
            SampleError: the prompt did not get into the engine's cache; no sample was requested.
            EngineError: the same, because the engine is down.
        """
        key = secrets.token_hex(8)
        wanted = [
            replace(sample, first_row=rows if number else 0, cached_rows=rows, cache_key=key)
            for number, sample in enumerate(samples_of(request))
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
            return await self._sample_group(wanted, rows, before, ended)
        finally:
            self._ahead.release(ahead)

    async def _sample_group(
        self, wanted: list[SampleRequest], rows: int, before: int, ended: Callable[[], None]
    ) -> dict[str, Trajectory]:
        """Return the whole group, or at most the leader if the group is in doubt.

        Args:
            before: value of `Recomputed` before the prompt went into the cache.
            ended: called once at the end of each sample.
        """
        samples = [asyncio.create_task(self._in_turn(one, ended)) for one in wanted]
        leader, *others = samples
        try:
            left = set(samples)
            while left:
                done, left = await asyncio.wait(left, return_when=asyncio.FIRST_COMPLETED)
                if reasons := [reason for task in done if (reason := self._why_in_doubt(task))]:
                    logger.info("samples %s ... are requested again: %s", wanted[0].sample_id, reasons[0])
                    await _end(others)
                    return await _alone(leader)
            trajectories = [task.result().trajectory for task in samples]
            if doubt := await self._doubt(trajectories, before):
                logger.info("samples %s ... are requested again: %s", wanted[0].sample_id, doubt)
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
        """Return why answers that all found the prompt in the cache may still differ; empty if they cannot."""
        if len({trajectory.weight_versions for trajectory in trajectories}) > 1:
            return "the weights changed among them"
        try:
            if await self._recomputed() == before:
                return ""
        except SampleError as error:
            return f"the engine does not report what it recomputed: {error}"
        self._lose()
        return "the engine discarded and recomputed a sample"

    def _why_in_doubt(self, task: asyncio.Task[Sample]) -> str:
        """Return why the group cannot use the leader's rows; empty if this sample found the prompt in the cache."""
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
            "the engine's cache lost a prompt before all of its samples began, or the engine restarted a sample for "
            "lack of memory: every sample fetches its prompt's routes itself until the weights have changed %d times. "
            "Raise strategy_config.max_total_tokens or lower max_concurrent_requests",
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
    """Complete the rows of a group. The leader comes first and has all its rows, the others theirs from `rows` on."""
    leader, *others = trajectories
    shared_MsK = _routes_of(leader).ids_MRK[:, :rows]
    whole = {leader.sample_id: leader}
    for other in others:
        ids_MRK = _routes_of(other).ids_MRK
        ids_MRK[:, :rows] = shared_MsK  # in place: a copy of a long prompt's rows for each sample would not be small
        whole[other.sample_id] = replace(other, routes=RoutedExperts(ids_MRK))
    return whole


def _routes_of(trajectory: Trajectory) -> RoutedExperts:
    assert isinstance(trajectory.routes, RoutedExperts), "only recorded routes are shared"
    return trajectory.routes
