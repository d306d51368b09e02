"""Rollout by one transformers model on one device, in this process."""

from __future__ import annotations

import asyncio
import logging
from dataclasses import dataclass

from roll_r3.batch.trajectory import Trajectory
from roll_r3.config.engine_role import EngineRole
from roll_r3.config.strategies import HfInferConfig
from roll_r3.engines.hf.model import LoadedModel
from roll_r3.engines.sample import SampleRequest, samples_of
from roll_r3.errors import EngineError
from roll_r3.strategies.base import EnginePlace, GenerateRequest, GenerateResult
from roll_r3.weights.target import ServerTarget

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Waiting:
    """Requested sample in the queue."""

    wanted: SampleRequest
    outcome: asyncio.Future[Trajectory | str]
    """The checked trajectory, or the reason why there is none."""

    def end(self, outcome: Trajectory | str) -> None:
        if not self.outcome.done():  # its caller may have been cancelled
            self.outcome.set_result(outcome)

    def fail(self, error: Exception) -> None:
        if not self.outcome.done():
            self.outcome.set_exception(error)


class HfRollout:
    """One engine. Implements `roll_r3.strategies.base.RolloutStrategy`.

    Weight versions are as in `ServerRollout`: after a channel's `end`, `on_weights_updated` must be called with the
    same number, and until both agree every sample is refused. An update waits for the end of the current batch.
    """

    def __init__(self, role: EngineRole, place: EnginePlace) -> None:
        """
        Args:
            place: `device` "cuda" is the one GPU of this process; `gpu_ids` and `log_path` are not used.
        """
        settings = role.settings
        assert isinstance(settings, HfInferConfig), "the registry gives each strategy its own settings"
        self._settings = settings
        self._role, self._place = role, place
        self._name = f"engine {place.engine_index} (transformers)"
        self._model: LoadedModel | None = None
        self._queue: list[_Waiting] = []
        self._sampling: asyncio.Task[None] | None = None
        self._weight_version = 0
        self._weights_due = False

    async def start(self) -> None:
        """Load the model.

        Raises:
            ConfigError: a checkpoint with unreadable routing facts, unknown routers, or missing weights.
        """
        dtype, device = self._settings.dtype, self._place.device
        self._model = await asyncio.to_thread(LoadedModel, self._role, self._place, dtype)
        logger.info("%s: %s on %s in %s", self._name, type(self._model.model).__name__, device, dtype)

    async def generate(self, request: GenerateRequest) -> GenerateResult:
        """Sample a group, in batches of `max_running_requests` samples with those of other calls.

        If it is cancelled, its samples in later batches are not made; the current batch is completed.

        Raises:
            EngineError: the engine is not running.
        """
        if self._model is None:
            raise EngineError(f"{self._name} is not running: start() comes first, and nothing after stop()")
        if self._weights_due:
            raise EngineError(f"{self._name} was restarted and has the checkpoint's weights: an update comes first")
        new_future = asyncio.get_running_loop().create_future
        group = [_Waiting(wanted, new_future()) for wanted in samples_of(request)]
        self._queue += group
        if self._sampling is None or self._sampling.done():
            # it starts once all calls of this moment are queued
            self._sampling = asyncio.create_task(self._sample_queue(self._model))
        outcomes = dict(zip(request.sample_ids, await asyncio.gather(*(one.outcome for one in group)), strict=True))
        return GenerateResult(
            trajectories=tuple(outcome for outcome in outcomes.values() if isinstance(outcome, Trajectory)),
            dropped={sample_id: outcome for sample_id, outcome in outcomes.items() if isinstance(outcome, str)},
        )

    async def _sample_queue(self, model: LoadedModel) -> None:
        """Sample batch after batch, until the queue is empty."""
        while batch := self._next_batch():
            try:
                outcomes = await asyncio.to_thread(model.sample, [one.wanted for one in batch], self._weight_version)
            except Exception as error:  # noqa: BLE001  # the callers raise it
                for one in (*batch, *self._queue):
                    one.fail(error)
                self._queue = []
                return
            for one, outcome in zip(batch, outcomes, strict=True):
                one.end(outcome)

    def _next_batch(self) -> list[_Waiting]:
        """Take the first samples of the queue, as long as their settings are alike; none if none is left."""
        self._queue = [one for one in self._queue if not one.outcome.done()]  # without those of cancelled calls
        if not self._queue:
            return []
        sampling = self._queue[0].wanted.sampling
        size = 0
        while size < min(len(self._queue), self._settings.max_running_requests):
            if self._queue[size].wanted.sampling != sampling:
                break
            size += 1
        batch, self._queue = self._queue[:size], self._queue[size:]
        return batch

    def weight_target(self) -> ServerTarget:
        if self._model is None:
            raise EngineError(f"{self._name} has no address yet: start() comes first")
        return ServerTarget(
            name=self._name,
            host=self._place.node_address,
            port=self._model.receiver.port,
            api_key=self._model.receiver.key,
            tp_size=1,
            dtype=self._settings.dtype,
        )

    async def on_weights_updated(self, version: int) -> None:
        """Accept samples of this weight version only. Call it after the weight channel's `end`."""
        self._weight_version, self._weights_due = version, False

    async def why_down(self, *, ask: bool) -> str:
        """Return empty: this engine ends with its process only."""
        return ""

    async def restart(self) -> None:
        """Reload the checkpoint; nothing is sampled before `on_weights_updated`."""
        await self.stop()
        self._weight_version, self._weights_due = 0, True
        await self.start()

    async def stop(self, *, at_once: bool = False) -> None:
        """Release the model, immediately in either case. Safe to call twice, and before `start`."""
        model, self._model = self._model, None
        if model is not None:
            await asyncio.to_thread(model.receiver.close)
