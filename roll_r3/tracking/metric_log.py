"""Log of metrics: always metrics.jsonl, and TensorBoard if configured."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType

from roll_r3.config.findings.write_errors import with_filename
from roll_r3.tracking.names import declared_order
from roll_r3.tracking.run_dir import RunDir
from roll_r3.tracking.run_summary import summarised


class MetricLog:
    """Writer of one set of metrics per step. Keeps the metrics of the final summary.

    A resumed run appends to its metrics.
    """

    def __init__(self, run_dir: RunDir, trackers: Sequence[str]) -> None:
        earlier = _read(run_dir.metrics_file)
        self.history: list[dict[str, float]] = [summarised(row) for row in earlier.values()]
        self._path, self._board_path = run_dir.metrics_file, run_dir.tensorboard_dir
        self._file = self._path.open("a")
        self._board = None
        if "tensorboard" in trackers:
            from torch.utils.tensorboard import SummaryWriter  # noqa: PLC0415  seconds to import

            is_new = not run_dir.tensorboard_dir.is_dir()
            # an existing board has these steps, and may have later ones, which will be repeated
            purge = None if is_new else max(earlier, default=0) + 1
            self._board = SummaryWriter(str(run_dir.tensorboard_dir), purge_step=purge)
            if is_new:
                for step, row in earlier.items():
                    self._show(step, row)

    def __enter__(self) -> MetricLog:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            with with_filename(self._path):
                self._file.close()
            if self._board is not None:
                with with_filename(self._board_path):
                    self._board.close()
        except OSError:
            if error is None:  # otherwise a full disk would be reported twice
                raise

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Record the metrics of a step.

        Raises:
            KeyError: a name is not declared in `roll_r3.tracking.names`.
        """
        declared, unknown = declared_order(metrics)
        if unknown:
            raise KeyError(f"metrics not declared in roll_r3.tracking.names: {', '.join(unknown)}")
        row = {name: float(metrics[name]) for name in declared}
        self.history.append(summarised(row))
        # JSON has no NaN or infinity: written as null; TensorBoard shows them
        line = {"step": step} | {n: v if math.isfinite(v) else None for n, v in row.items()}
        with with_filename(self._path):
            self._file.write(json.dumps(line) + "\n")
            self._file.flush()
        self._show(step, row)

    def _show(self, step: int, row: Mapping[str, float]) -> None:
        if self._board is not None:
            with with_filename(self._board_path):
                for name, value in row.items():
                    self._board.add_scalar(name, value, step)
                self._board.flush()


def _read(metrics: Path) -> dict[int, dict[str, float]]:
    """Read the metrics of each step."""
    lines = metrics.read_text().splitlines() if metrics.is_file() else []
    rows = {}
    for line in lines:
        row = json.loads(line)
        rows[int(row.pop("step"))] = {name: math.nan if value is None else value for name, value in row.items()}
    return rows


def last_step(metrics: Path) -> int:
    """Return the last written step; 0 if there is none."""
    return max(_read(metrics), default=0)
