"""From a request to its result: every sample in flight at once, retried when it failed, never twice in a result."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Protocol

from roll_r3.batch.trajectory import Trajectory
from roll_r3.errors import EngineError, RouteError
from roll_r3.strategies.base import GenerateRequest, GenerateResult

logger = logging.getLogger(__name__)


class SampleError(Exception):
    """One sample did not come back usable; asking for it again may help. The text says what was wrong with it."""


@dataclass(frozen=True)
class SampleRequest:
    """One sample, and which rows of its routes are wanted."""

    prompt_ids: tuple[int, ...]
    sample_id: str
    seed: int
    first_row: int = 0
    """Routes come from this row on."""
    cached_rows: int = 0
    """The engine must find at least this many tokens of the prompt in its prefix cache."""
    cache_key: str = ""
    """Requests find each other's prefixes in the engine's cache only under the same key."""
    group_id: str = ""
    """Group of the sample; empty for a sample of a warm-up."""


@dataclass(frozen=True)
class Sample:
    """A checked answer to a `SampleRequest`."""

    trajectory: Trajectory
    """Rows of its routes before `first_row` are unknown."""
    from_cache: bool
    """The engine vouches that the first `cached_rows` tokens came from its cache and were not computed again."""


Ask = Callable[[SampleRequest], Awaitable[Sample]]
"""Raises SampleError or RouteError; EngineError when the engine is down, and for every sample after that."""


class Sharing(Protocol):
    """How the samples of one prompt come by the rows of its routes that are the same for all."""

    def shareable_rows(self, request: GenerateRequest) -> int:
        """How many rows of the prompt one sample can fetch for all of them; 0: each fetches its own."""

    async def share(self, request: GenerateRequest, rows: int) -> dict[str, Trajectory]:
        """Ask for every sample once, the prompt's first `rows` rows with one of them only.

        Returns:
            Sample id -> the sample with all its rows. Those that are missing were asked for and must be again.

        Raises:
            SampleError: the prompt did not get into the engine's cache; no sample was asked for.
            EngineError: the same, since the engine is down.
        """


async def sample_group(request: GenerateRequest, ask: Ask, sharing: Sharing, max_retries: int) -> GenerateResult:
    """Ask for every sample of a prompt, all at once; `ask` limits the number of samples in flight.

    A sample that fails is asked for again under the same id, up to `max_retries` times, then dropped with the last
    reason; to share a prompt's rows costs none of these retries. Samples that an engine which went down did not bring
    are lost, the others are kept. Trajectories come in the order of `sample_ids`.
    """
    if len(request.seeds) != len(request.sample_ids):
        raise ValueError(f"{len(request.sample_ids)} sample ids came with {len(request.seeds)} seeds")
    came: dict[str, Trajectory] = {}
    asked = False
    if rows := sharing.shareable_rows(request):
        try:
            came = await sharing.share(request, rows)
            asked = True
        except SampleError as error:
            logger.warning("samples %s ... each fetch their prompt's routes: %s", request.sample_ids[0], error)
        except EngineError:
            pass  # which each of them will meet by itself
    alone = [
        SampleRequest(request.prompt_ids, sample_id, seed, group_id=request.group_id)
        for sample_id, seed in zip(request.sample_ids, request.seeds, strict=True)
        if sample_id not in came
    ]
    outcomes = await asyncio.gather(*(_sample(wanted, ask, max_retries) for wanted in alone))
    came |= {o.trajectory.sample_id: o.trajectory for o in outcomes if o.trajectory is not None}
    by_id = {wanted.sample_id: outcome for wanted, outcome in zip(alone, outcomes, strict=True)}
    lost = tuple(sample_id for sample_id, outcome in by_id.items() if outcome.lost)
    return GenerateResult(
        trajectories=tuple(came[sample_id] for sample_id in request.sample_ids if sample_id in came),
        dropped={sample_id: outcome.dropped for sample_id, outcome in by_id.items() if outcome.dropped},
        lost=lost,
        retries=sum(outcome.retries for outcome in outcomes) + (len(alone) - len(lost) if asked else 0),
    )


@dataclass(frozen=True)
class _Outcome:
    """Of one sample: exactly one of the first three."""

    trajectory: Trajectory | None = None
    dropped: str = ""
    lost: bool = False
    retries: int = 0


async def _sample(wanted: SampleRequest, ask: Ask, max_retries: int) -> _Outcome:
    reason = ""
    for attempt in range(max_retries + 1):
        try:
            return _Outcome((await ask(wanted)).trajectory, retries=attempt)
        except (SampleError, RouteError) as error:
            reason = str(error)
            logger.warning("sample %s, attempt %d of %d: %s", wanted.sample_id, attempt + 1, max_retries + 1, reason)
        except EngineError:
            return _Outcome(lost=True, retries=attempt)
    return _Outcome(dropped=reason or "no reason given", retries=max_retries)
