"""TensorBoard: event files in the run's directory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from roll_r3.tracking.trackers.base import Row, TrackedRun

FOLDER = "tensorboard"


class TensorboardTracker:
    """Event files. Implements `roll_r3.tracking.trackers.base.Tracker`."""

    def __init__(self, run: TrackedRun, kwargs: Mapping[str, Any]) -> None:
        from torch.utils.tensorboard import SummaryWriter

        folder = run.directory / FOLDER
        self.continues = folder.is_dir()
        # an existing board may have later steps, which will be repeated
        purge = run.next_step if self.continues else None
        self._writer = SummaryWriter(**({"log_dir": str(folder), "purge_step": purge} | dict(kwargs)))

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        for name, value in metrics.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def log_samples(self, step: int, name: str, rows: Sequence[Row]) -> None:
        """Do nothing: TensorBoard has no tables."""

    def close(self) -> None:
        self._writer.close()
