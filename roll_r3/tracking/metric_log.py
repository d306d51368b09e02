"""Where metrics go: metrics.jsonl always, TensorBoard when asked for."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from types import TracebackType

from roll_r3.tracking.names import METRICS
from roll_r3.tracking.run_dir import RunDir


class MetricLog:
    """Writes one set of metrics a step, and keeps them for the report at the end."""

    def __init__(self, run_dir: RunDir, trackers: Sequence[str]) -> None:
        self._file = run_dir.metrics_file.open("a")
        self._board = None
        if "tensorboard" in trackers:
            from torch.utils.tensorboard import SummaryWriter  # noqa: PLC0415  seconds to import

            self._board = SummaryWriter(str(run_dir.tensorboard_dir))
        self.history: list[dict[str, float]] = []

    def __enter__(self) -> MetricLog:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()
        if self._board is not None:
            self._board.close()

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Record step `step`.

        Raises:
            KeyError: a name that `roll_r3.tracking.names` does not declare.
        """
        unknown = sorted(set(metrics) - set(METRICS))
        if unknown:
            raise KeyError(f"metrics that roll_r3.tracking.names does not declare: {', '.join(unknown)}")
        row = {name: float(metrics[name]) for name in METRICS if name in metrics}
        self.history.append(row)
        # JSON has no NaN or infinity: they are written as null, and TensorBoard shows them
        line = {"step": step} | {n: v if math.isfinite(v) else None for n, v in row.items()}
        self._file.write(json.dumps(line) + "\n")
        self._file.flush()
        if self._board is not None:
            for name, value in row.items():
                self._board.add_scalar(name, value, step)
            self._board.flush()
