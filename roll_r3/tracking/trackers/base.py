"""Contract between a run and the library of a tracker."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

Row = Mapping[str, Any]
"""Column -> text or number of a sample."""


class Tracker(Protocol):
    """Open run of a tracker. Every method may raise anything; all are called from one thread."""

    @property
    def continues(self) -> bool:
        """True if the tracker has the steps of an earlier start of this run."""

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Record metrics of a step. Some are not finite. A step may have several calls, and repeats after a resume."""

    def log_samples(self, step: int, name: str, rows: Sequence[Row]) -> None:
        """Record samples as a table, where the tracker has one. All rows have the same columns."""

    def close(self) -> None:
        """Complete the tracker's run."""


@dataclass(frozen=True)
class TrackedRun:
    """Run as described to a tracker."""

    directory: Path
    """Directory of the run; its name is the run's."""
    config: Mapping[str, Any]
    """Configuration without secrets, as plain values."""
    earlier: Mapping[int, Mapping[str, float]] = field(default_factory=dict)
    """Step -> metrics written by earlier starts of this run."""

    @property
    def name(self) -> str:
        return self.directory.name

    @property
    def experiment(self) -> str:
        return str(self.config.get("exp_name", self.directory.parent.name))

    @property
    def next_step(self) -> int:
        """Return the first step without metrics; an evaluation before the first step has number 0."""
        return max(self.earlier, default=-1) + 1

    def earlier_id(self, tracker: str) -> str | None:
        """Return the tracker's id of this run, stored by an earlier start; None: this is the first."""
        path = self._id_file(tracker)
        return path.read_text().strip() or None if path.is_file() else None

    def store_id(self, tracker: str, run_id: str) -> None:
        """Keep the tracker's id of this run for a later start."""
        path = self._id_file(tracker)
        path.parent.mkdir(exist_ok=True)
        path.write_text(run_id + "\n")

    def _id_file(self, tracker: str) -> Path:
        return self.directory / "trackers" / f"{tracker}-run-id"


Start = Callable[[TrackedRun, Mapping[str, Any]], Tracker]
"""Open the run, with arguments of the library's own start function."""
