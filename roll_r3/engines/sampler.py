"""The way of a sample through one server, from request to checked result: read `Sampler` from top to bottom.

    generate -> _sample -> ask -> client.post -> codec.read -> checked_sample

Samples with shared routes of their prompt go through `roll_r3.engines.sharing` first; it calls `ask` as well.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
from contextlib import suppress
from dataclasses import dataclass, replace

from roll_r3.batch.trajectory import Trajectory
from roll_r3.engines.client import ServerClient, UnreachableError
from roll_r3.engines.health import EXIT_S, Health
from roll_r3.engines.parts import Parts
from roll_r3.engines.sample import Asked, Sample, SampleError, SampleRequest, samples_of
from roll_r3.engines.sharing import PromptSharing
from roll_r3.engines.slots import Slots
from roll_r3.errors import EngineError, RouteError
from roll_r3.models.facts import ModelFacts
from roll_r3.strategies.base import GenerateRequest, GenerateResult

logger = logging.getLogger(__name__)


class Sampler:
    """Requests to one running server."""

    def __init__(
        self,
        parts: Parts,
        client: ServerClient,
        facts: ModelFacts,
        health: Health,
        *,
        running_requests: int,
    ) -> None:
        """
        Args:
            running_requests: samples decoded at once by the server.
        """
        self._codec, self._status, self._settings = parts.codec, parts.status, parts.settings
        self._client = client
        self._facts = facts
        self._health = health
        self._slots = Slots(self._settings.max_concurrent_requests)
        self.sharing = PromptSharing(
            self.ask, self.prime, self.recomputed, self._slots, running_requests=running_requests
        )
        self.weight_version = 0
        """Required version of every answer."""

    async def generate(self, request: GenerateRequest) -> GenerateResult:
        """Sample a group, all samples at once.

        A failed sample is requested again under the same id, up to `max_retries` times, then dropped with the last
        reason. Sharing the prompt's rows costs none of these retries. Samples not returned by a dead engine are
        lost; the others are kept. Trajectories come in the order of `sample_ids`.
        """
        samples = samples_of(request)
        came: dict[str, Trajectory] = {}
        shared = False
        if rows := self.sharing.shareable_rows(request):
            try:
                came = await self.sharing.share(request, rows)
                shared = True
            except SampleError as error:
                logger.warning("samples %s ... each fetch their prompt's routes: %s", request.sample_ids[0], error)
            except EngineError:
                pass  # each sample below meets it again
        alone = [sample for sample in samples if sample.sample_id not in came]
        found = await asyncio.gather(*map(self._sample, alone))
        outcomes = {sample.sample_id: outcome for sample, outcome in zip(alone, found, strict=True)}
        came |= {sample_id: o.trajectory for sample_id, o in outcomes.items() if o.trajectory is not None}
        lost = tuple(sample_id for sample_id, outcome in outcomes.items() if outcome.lost)
        return GenerateResult(
            trajectories=tuple(came[sample_id] for sample_id in request.sample_ids if sample_id in came),
            dropped={sample_id: outcome.dropped for sample_id, outcome in outcomes.items() if outcome.dropped},
            lost=lost,
            retries=sum(o.retries for o in outcomes.values()) + (len(alone) - len(lost) if shared else 0),
        )

    async def _sample(self, wanted: SampleRequest) -> _Outcome:
        """Request one sample until it comes back usable, the retries are used up, or the engine is down."""
        attempts = self._settings.max_retries + 1
        reason = ""
        for attempt in range(attempts):
            try:
                async with self._slots.hold():
                    sample = await self.ask(wanted)
                return _Outcome(sample.trajectory, retries=attempt)
            except (SampleError, RouteError) as error:
                reason = str(error)
                logger.warning("sample %s, attempt %d of %d: %s", wanted.sample_id, attempt + 1, attempts, reason)
            except EngineError:
                return _Outcome(lost=True, retries=attempt)
        return _Outcome(dropped=reason or "no reason given", retries=attempts - 1)

    async def ask(self, wanted: SampleRequest) -> Sample:
        """Send one request and check its answer. Takes no slot. A cancelled request ends at the server too.

        Raises:
            SampleError: no usable answer.
            RouteError: log-probabilities or routes break their contract.
            EngineError: the server is dead, or dies meanwhile.
        """
        asked = Asked(wanted, self.weight_version, secrets.token_hex(16))
        self._health.require_running()
        try:
            body = await self._health.until_exit(
                self._client.post(
                    self._codec.path,
                    self._codec.request(asked),
                    self._settings.request_timeout,
                    asked.most_bytes(self._facts, self._codec.kept_limit(asked)),
                )
            )
        except UnreachableError:
            await self._health.until_exit(asyncio.sleep(EXIT_S))  # a server that dies refuses connections first
            raise
        except asyncio.CancelledError:
            with suppress(SampleError):
                await self._status.abort(self._client, asked.request_id)
            raise
        return await asyncio.to_thread(self._codec.read, body, asked, self._facts)

    async def prime(self, wanted: SampleRequest) -> None:
        """Put a prompt into the prefix cache, by sampling one token of it. Raises as `ask`.

        No routes are requested: the cache may have refused this copy of the prompt and kept another.
        """
        one_token = replace(wanted.sampling, max_new_tokens=1, stop_strings=())
        await self.ask(replace(wanted, sampling=one_token, record_routes=False))

    async def recomputed(self) -> int:
        """Return `Status.recomputed` of this server."""
        return await self._status.recomputed(self._client)

    def weights_updated(self, version: int) -> None:
        """Accept answers of this weight version only."""
        self.weight_version = version
        self.sharing.weights_changed()


@dataclass(frozen=True)
class _Outcome:
    """Result of one sample: exactly one of the first three fields is set."""

    trajectory: Trajectory | None = None
    dropped: str = ""
    lost: bool = False
    retries: int = 0
