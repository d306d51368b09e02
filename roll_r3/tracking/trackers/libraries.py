"""Libraries of trackers. A library is imported in the thread of its tracker only."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import Any

from pydantic import BaseModel

from roll_r3.config.secrets import HIDDEN
from roll_r3.tracking.trackers.base import Start


@dataclass(frozen=True)
class Library:
    """Library of one tracker."""

    package: str
    """Name of its distribution."""
    extra: str
    """Extra of roll_r3 that installs it."""
    module: str
    """Module of `roll_r3.tracking.trackers`."""
    starter: str
    """Class in this module."""

    def load(self) -> Start:
        """Import the module. The library itself is imported by `Start`."""
        start: Start = getattr(import_module(f"roll_r3.tracking.trackers.{self.module}"), self.starter)
        return start


LIBRARIES: Mapping[str, Library] = {
    "tensorboard": Library("tensorboard", "cpu", "tensorboard", "TensorboardTracker"),
    "wandb": Library("wandb", "wandb", "wandb", "WandbTracker"),
    "mlflow": Library("mlflow", "mlflow", "mlflow", "MlflowTracker"),
    "swanlab": Library("swanlab", "swanlab", "swanlab", "SwanlabTracker"),
    "trackio": Library("trackio", "trackio", "trackio", "TrackioTracker"),
}
"""Name in `track_with` -> its library."""


def without_secrets(config: BaseModel) -> dict[str, Any]:
    """Return a configuration as plain values for a tracker, without values of environment variables.

    `tracker_kwargs` is left out: it is for the trackers' libraries.
    """
    values = config.model_dump(mode="json", exclude={"tracker_kwargs"})
    if "system_envs" in values:
        values["system_envs"] = dict.fromkeys(values["system_envs"], HIDDEN)
    return values
