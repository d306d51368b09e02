"""SwanLab. The key comes from `SWANLAB_API_KEY` or `swanlab login`; `SWANLAB_MODE=offline` needs none."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any
from uuid import uuid4

from roll_r3.tracking.trackers.base import Row, TrackedRun

_NAME = "swanlab"


class SwanlabTracker:
    """Run of SwanLab. Implements `roll_r3.tracking.trackers.base.Tracker`."""

    def __init__(self, run: TrackedRun, kwargs: Mapping[str, Any]) -> None:
        import swanlab

        earlier = run.earlier_id(_NAME)
        self.continues = earlier is not None
        run_id = earlier or uuid4().hex[:21]
        arguments: dict[str, Any] = {
            "project": run.experiment,
            "name": run.name,
            "log_dir": str(run.directory / _NAME),
            "config": dict(run.config),
            "id": run_id,
            "resume": "allow",
            "settings": swanlab.Settings(interactive=False),  # else it asks for a key
        }
        arguments |= kwargs
        self._text = swanlab.Text
        self._run = swanlab.init(**arguments)
        run.store_id(_NAME, arguments["id"])

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        self._run.log(dict(metrics), step=step)

    def log_samples(self, step: int, name: str, rows: Sequence[Row]) -> None:
        """Record a text for each sample: a table of SwanLab holds no long texts."""
        texts = ["\n".join(f"{column}: {value}" for column, value in row.items()) for row in rows]
        self._run.log({name: [self._text(text) for text in texts]}, step=step)

    def close(self) -> None:
        self._run.finish()
