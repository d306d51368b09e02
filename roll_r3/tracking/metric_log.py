"""Log of metrics: always metrics.jsonl, and the configured trackers."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from roll_r3.config.findings.write_errors import with_filename
from roll_r3.tracking.names import declared_order
from roll_r3.tracking.run_dir import RunDir
from roll_r3.tracking.run_summary import summarised
from roll_r3.tracking.trackers.background import BackgroundTracker
from roll_r3.tracking.trackers.base import Row, TrackedRun
from roll_r3.tracking.trackers.libraries import LIBRARIES

logger = logging.getLogger(__name__)

EVALUATION = "val/"
"""Beginning of the names of an evaluation's scores."""
_OF_EVALUATION = (EVALUATION, "time/step_evaluation")
_CLOSE_S, _CLOSE_AT_EXIT_S = 60.0, 5.0
"""Seconds for the trackers to end, after the run, and after a signal."""


class MetricLog:
    """Writer of one set of metrics per step, and of one per evaluation. Keeps the metrics of the final summary.

    A resumed run appends to its metrics.
    """

    def __init__(
        self,
        run_dir: RunDir,
        trackers: Sequence[str],
        *,
        kwargs: Mapping[str, Mapping[str, Any]] | None = None,
        config: Mapping[str, Any] | None = None,
        say: Callable[[str], None] = logger.warning,
    ) -> None:
        """
        Args:
            kwargs: name of a tracker -> arguments of its library's start function.
            config: plain values shown by trackers.
            say: receives a message about a failing tracker.
        """
        earlier = _read(run_dir.metrics_file)
        self.history = [summarised(row) for row in earlier.values() if not row or _without_evaluation(row)]
        """Metrics of each step."""
        self.evaluations = {step: scores for step, row in earlier.items() if (scores := _scores(row))}
        """Step -> scores of the evaluation after it."""
        self._path = run_dir.metrics_file
        self._file = self._path.open("a")
        run = TrackedRun(run_dir.path, config or {}, earlier)
        self._trackers = [
            BackgroundTracker(name, LIBRARIES[name].load(), run, _arguments(kwargs or {}, name), say)
            for name in trackers
        ]

    def __enter__(self) -> MetricLog:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            with with_filename(self._path):
                self._file.close()
        except OSError:
            if error is None:  # otherwise a full disk would be reported twice
                raise
        finally:
            for tracker in self._trackers:
                tracker.close(_CLOSE_S if error is None or isinstance(error, Exception) else _CLOSE_AT_EXIT_S)

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Record the metrics of a step.

        Raises:
            KeyError: a name is not declared in `roll_r3.tracking.names`.
        """
        self.history.append(summarised(self._record(step, metrics)))

    def write_evaluation(self, step: int, metrics: Mapping[str, float]) -> None:
        """Record the evaluation after a step. Raises as `write`."""
        self.evaluations[step] = _scores(self._record(step, metrics))

    def write_samples(self, step: int, name: str, rows: Sequence[Row]) -> None:
        """Show samples in the trackers with tables. Values other than texts and numbers become JSON."""
        plain = [{column: _plain(value) for column, value in row.items()} for row in rows]
        for tracker in self._trackers:
            tracker.log_samples(step, name, plain)

    def _record(self, step: int, metrics: Mapping[str, float]) -> dict[str, float]:
        declared, unknown = declared_order(metrics)
        if unknown:
            raise KeyError(f"metrics not declared in roll_r3.tracking.names: {', '.join(unknown)}")
        row = {name: float(metrics[name]) for name in declared}
        # JSON has no NaN or infinity: written as null; trackers may show them
        line = {"step": step} | {n: v if math.isfinite(v) else None for n, v in row.items()}
        with with_filename(self._path):
            self._file.write(json.dumps(line) + "\n")
            self._file.flush()
        for tracker in self._trackers:
            tracker.log(step, row)
        return row


def _arguments(kwargs: Mapping[str, Mapping[str, Any]], name: str) -> dict[str, Any]:
    """Return the arguments of a tracker; libraries ask for lists, where the configuration has tuples."""
    given = kwargs.get(name, {})
    return {key: list(value) if isinstance(value, tuple) else value for key, value in given.items()}


def _plain(value: Any) -> Any:
    return value if value is None or isinstance(value, str | int | float) else json.dumps(value, default=str)


def _without_evaluation(row: Mapping[str, float]) -> bool:
    """Return True if a row has metrics of a step."""
    return any(not name.startswith(_OF_EVALUATION) for name in row)


def _scores(row: Mapping[str, float]) -> dict[str, float]:
    return {name: value for name, value in row.items() if name.startswith(EVALUATION)}


def _read(metrics: Path) -> dict[int, dict[str, float]]:
    """Read the metrics of each step, its evaluation included."""
    lines = metrics.read_text().splitlines() if metrics.is_file() else []
    rows: dict[int, dict[str, float]] = {}
    for line in lines:
        row = json.loads(line)
        step = int(row.pop("step"))
        rows.setdefault(step, {}).update({name: math.nan if value is None else value for name, value in row.items()})
    return rows


def last_step(metrics: Path) -> int:
    """Return the last written step; 0 if there is none."""
    return max(_read(metrics), default=0)


def evaluated_steps(metrics: str) -> set[int]:
    """Return the steps with an evaluation in the text of metrics.jsonl. Lines cut off are skipped."""
    steps = set()
    for line in metrics.splitlines():
        try:
            row = json.loads(line)
            if isinstance(row, dict) and any(name.startswith(EVALUATION) for name in row):
                steps.add(int(row["step"]))
        except (ValueError, TypeError, KeyError, RecursionError):
            continue
    return steps
