"""MLflow. Its server and credentials come from `MLFLOW_TRACKING_URI` and its other variables."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from roll_r3.tracking.trackers.base import Row, TrackedRun

_NAME = "mlflow"
_NOT_ALLOWED = re.compile(r"[^\w./ -]")


class MlflowTracker:
    """Run of MLflow. Implements `roll_r3.tracking.trackers.base.Tracker`.

    MLflow's active run belongs to a thread, and all calls come from one.
    """

    def __init__(self, run: TrackedRun, kwargs: Mapping[str, Any]) -> None:
        import mlflow

        self._mlflow = mlflow
        earlier = run.earlier_id(_NAME)
        self.continues = earlier is not None
        arguments: dict[str, Any] = {"run_name": run.name, "run_id": earlier} | dict(kwargs)
        if earlier is None and "experiment_id" not in arguments:
            arguments["experiment_id"] = mlflow.set_experiment(run.experiment).experiment_id
        started = mlflow.start_run(**arguments)
        run.store_id(_NAME, started.info.run_id)
        mlflow.log_dict(dict(run.config), "config.json")

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        self._mlflow.log_metrics({_allowed(name): value for name, value in metrics.items()}, step=step)

    def log_samples(self, step: int, name: str, rows: Sequence[Row]) -> None:
        columns = {column: [row[column] for row in rows] for column in rows[0]}
        self._mlflow.log_table(columns, artifact_file=f"{_allowed(name)}/step-{step:08d}.json")

    def close(self) -> None:
        self._mlflow.end_run()


def _allowed(name: str) -> str:
    """Return a name without characters refused by MLflow: pass@4 becomes pass_at_4."""
    return _NOT_ALLOWED.sub("_", name.replace("@", "_at_"))
