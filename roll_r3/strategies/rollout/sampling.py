"""From requests to results: every sample in flight at once, asked again when it failed, never twice in a result."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Sequence

from roll_r3.batch.trajectory import Trajectory
from roll_r3.errors import RouteError
from roll_r3.strategies.base import GenerateRequest, GenerateResult

logger = logging.getLogger(__name__)


class SampleError(Exception):
    """One sample did not come back usable; asking for it again may help. The text says what was wrong with it."""


Ask = Callable[[tuple[int, ...], str, int], Awaitable[Trajectory]]
"""(prompt ids, sample id, seed) -> the checked trajectory; raises SampleError or RouteError."""


async def sample_all(requests: Sequence[GenerateRequest], ask: Ask, *, max_retries: int) -> list[GenerateResult]:
    """Ask for every sample of every request, all at once; `ask` limits how many are really in flight.

    A sample that fails is asked for again under the same id, up to `max_retries` times, then dropped with the last
    reason. Results come in the order of `requests`, trajectories in the order of their `sample_ids`.
    """
    return list(await asyncio.gather(*(_sample_group(request, ask, max_retries) for request in requests)))


async def _sample_group(request: GenerateRequest, ask: Ask, max_retries: int) -> GenerateResult:
    if len(request.seeds) != len(request.sample_ids):
        raise ValueError(f"{len(request.sample_ids)} sample ids came with {len(request.seeds)} seeds")
    outcomes = await asyncio.gather(
        *(
            _sample(request.prompt_ids, sample_id, seed, ask, max_retries)
            for sample_id, seed in zip(request.sample_ids, request.seeds, strict=True)
        )
    )
    return GenerateResult(
        trajectories=tuple(outcome for outcome, _ in outcomes if isinstance(outcome, Trajectory)),
        dropped={
            sample_id: outcome
            for sample_id, (outcome, _) in zip(request.sample_ids, outcomes, strict=True)
            if isinstance(outcome, str)
        },
        retries=sum(retries for _, retries in outcomes),
    )


async def _sample(
    prompt_ids: tuple[int, ...], sample_id: str, seed: int, ask: Ask, max_retries: int
) -> tuple[Trajectory | str, int]:
    """The trajectory, or why it was given up; and how often it was asked for again."""
    reason = ""
    for attempt in range(max_retries + 1):
        try:
            return await ask(prompt_ids, sample_id, seed), attempt
        except (SampleError, RouteError) as error:
            reason = str(error)
            logger.warning("sample %s, attempt %d of %d: %s", sample_id, attempt + 1, max_retries + 1, reason)
    return reason, max_retries
