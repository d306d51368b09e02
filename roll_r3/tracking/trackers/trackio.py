"""Trackio: a local database, by default in the hub's cache (`TRACKIO_DIR`), or a Space (`HF_TOKEN`)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from roll_r3.tracking.trackers.base import Row, TrackedRun

_NAME = "trackio"


class TrackioTracker:
    """Run of Trackio. Implements `roll_r3.tracking.trackers.base.Tracker`."""

    def __init__(self, run: TrackedRun, kwargs: Mapping[str, Any]) -> None:
        import trackio

        self.continues = run.earlier_id(_NAME) is not None
        arguments: dict[str, Any] = {
            "project": run.experiment,
            "name": run.name,
            "config": dict(run.config),
            "resume": "allow",
            "embed": False,  # a page for notebooks
        }
        self._table = trackio.Table
        self._run = trackio.init(**(arguments | dict(kwargs)))
        run.store_id(_NAME, str(self._run.name))

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        self._run.log({name: value for name, value in metrics.items() if math.isfinite(value)}, step=step)

    def log_samples(self, step: int, name: str, rows: Sequence[Row]) -> None:
        table = self._table(columns=list(rows[0]), data=[list(row.values()) for row in rows])
        self._run.log({name: table}, step=step)

    def close(self) -> None:
        self._run.finish()
