"""Weights & Biases. The key comes from `WANDB_API_KEY` or `wandb login`; `WANDB_MODE=offline` needs none."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any
from uuid import uuid4

from roll_r3.tracking.trackers.base import Row, TrackedRun

_NAME = "wandb"
_STEP = "step"


class WandbTracker:
    """Run of Weights & Biases. Implements `roll_r3.tracking.trackers.base.Tracker`.

    The step is an axis of its own: W&B drops steps below its counter, and a resumed run repeats some.
    """

    def __init__(self, run: TrackedRun, kwargs: Mapping[str, Any]) -> None:
        import wandb

        earlier = run.earlier_id(_NAME)
        self.continues = earlier is not None
        arguments: dict[str, Any] = {
            "project": run.experiment,
            "name": run.name,
            "dir": str(run.directory),
            "config": dict(run.config),
            "id": earlier or uuid4().hex[:8],
            "resume": "allow",
            "settings": {"console": "off", "quiet": True},  # else it takes the terminal
        }
        arguments |= kwargs
        mode = arguments.get("mode") or wandb.setup().settings.mode
        if mode in ("online", "shared") and not wandb.login(prompt=False):
            raise RuntimeError("there is no key: set WANDB_API_KEY, or WANDB_MODE=offline")
        self._table = wandb.Table
        self._run = wandb.init(**arguments)
        run.store_id(_NAME, self._run.id)
        self._run.define_metric(_STEP)
        self._run.define_metric("*", step_metric=_STEP)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        self._run.log({_STEP: step, **metrics})

    def log_samples(self, step: int, name: str, rows: Sequence[Row]) -> None:
        table = self._table(columns=list(rows[0]), data=[list(row.values()) for row in rows], allow_mixed_types=True)
        self._run.log({_STEP: step, name: table})

    def close(self) -> None:
        self._run.finish()
