"""The directory of a run: output/<exp_name>/<run>/, with output/<exp_name>/latest pointing at it."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class RunDir:
    """Where a run keeps its files."""

    path: Path

    @classmethod
    def create(cls, output_dir: str, exp_name: str, now: datetime) -> RunDir:
        """A new directory named after the time; two runs that start in one second get different names."""
        parent = Path(output_dir).absolute() / exp_name
        parent.mkdir(parents=True, exist_ok=True)
        stem = now.strftime("%Y%m%d-%H%M%S")
        for attempt in range(1000):
            path = parent / (stem if not attempt else f"{stem}-{attempt}")
            try:
                path.mkdir()
                break
            except FileExistsError:
                continue
        (path / "logs").mkdir()
        pointer = parent / f".latest-{os.getpid()}"
        pointer.symlink_to(path.name)
        pointer.replace(parent / "latest")
        return cls(path)

    def log_file(self, actor: str) -> Path:
        return self.path / "logs" / f"{actor}.log"

    @property
    def metrics_file(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def samples_file(self) -> Path:
        return self.path / "samples.jsonl"

    @property
    def tensorboard_dir(self) -> Path:
        return self.path / "tensorboard"

    def write_json(self, name: str, value: Mapping[str, Any]) -> None:
        (self.path / name).write_text(json.dumps(value, indent=2) + "\n")
