"""All roles of a run: launched, started and ended together."""

from __future__ import annotations

import logging
import os
from contextlib import nullcontext
from pathlib import Path
from types import TracebackType
from typing import Self

import ray

from roll_r3.cluster.calls import Say, Waiting
from roll_r3.cluster.daemons import vital
from roll_r3.cluster.models import ModelGroup
from roll_r3.cluster.placement import Placement
from roll_r3.cluster.rollouts import RolloutGroup
from roll_r3.cluster.worker_group import Unbroken
from roll_r3.config.pipeline import RLVRConfig

logger = logging.getLogger(__name__)

STOP_TIMEOUT = 30.0
"""Seconds for workers to shut down in order at the end of a successful run."""
FAILED_STOP_TIMEOUT = 5.0
"""The same after a failure: the ranks left may wait for a dead one, and only the engines have something to end."""


class Roles:
    """All roles of a run: launched together, started side by side, ended together."""

    def __init__(
        self,
        config: RLVRConfig,
        placement: Placement,
        log_dir: Path,
        unbroken: Unbroken = nullcontext,
        say: Say | None = None,
    ) -> None:
        """Launch every role's actors; nothing is started yet.

        Args:
            unbroken: see `WorkerGroup`.
            say: shows a line to the person who started the run.
        """
        self._waiting = waiting = Waiting(config.worker_timeouts, say)
        ranks = len(config.actor_train.device_mapping)
        threads = max(1, (os.cpu_count() or 1) // ranks) if placement.kind == "cpu" else 1
        self.rollout = RolloutGroup.launch(config, placement, log_dir, waiting)
        self.trainer = ModelGroup.launch(config, "actor_train", placement, threads, log_dir, unbroken, waiting)
        self.reference: ModelGroup | None = None
        if config.reference is not None:
            self.reference = ModelGroup.launch(config, "reference", placement, threads, log_dir, unbroken, waiting)

    @property
    def _models(self) -> list[ModelGroup]:
        return [self.trainer, *([self.reference] if self.reference else [])]

    def start(self) -> None:
        """Start engines and load models, all at once. Raises WorkerError for the first failure."""
        calls = self.rollout.begin_start()
        for model in self._models:
            calls |= model.begin_start()
        results = self._waiting.wait_for(calls, "start")
        for model in self._models:
            model.started(results)
        self._waiting.meet()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Let every process leave, then end it, or end it at once on a signal. Raises nothing of its own: an error
        may be on its way already. Without Ray's own processes nobody answers, and the workers are killed already."""
        if any(daemon.state == "gone" for daemon in vital()):
            return
        try:
            calls = self.rollout.begin_close(at_once=kind is not None)
            for model in self._models:
                calls |= model.begin_close()
            timeout = STOP_TIMEOUT if kind is None else FAILED_STOP_TIMEOUT
            _, late = ray.wait(list(calls), num_returns=len(calls), timeout=timeout)
            if late and kind is None:
                names = ", ".join(calls[ref][0] for ref in late)
                logger.warning("%s did not leave within %.0f s; ending their processes", names, timeout)
        finally:
            for group in (self.rollout, *self._models):
                group.kill()
