"""The directory of a run: output/<exp_name>/<run>/, with output/<exp_name>/latest pointing at it."""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from roll_r3.errors import ConfigError


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
        _point_at(path)
        return cls(path)

    @classmethod
    def reopen(cls, output_dir: str, exp_name: str, run: str) -> RunDir:
        """The directory of a run that goes on, made if it is not there (its checkpoints may be on another disk)."""
        path = Path(output_dir).absolute() / exp_name / run
        (path / "logs").mkdir(parents=True, exist_ok=True)
        _point_at(path)
        return cls(path)

    @contextmanager
    def locked(self) -> Iterator[None]:
        """No other process runs in this directory meanwhile; the lock ends with the process.

        Raises:
            ConfigError: one does.
        """
        with (self.path / ".lock").open("w") as stream:
            try:
                fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise ConfigError(f"another process runs in {self.path}: end it first") from error
            yield

    @property
    def log_dir(self) -> Path:
        return self.path / "logs"

    def log_file(self, actor: str) -> Path:
        return self.log_dir / f"{actor}.log"

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


def _point_at(path: Path) -> None:
    """Have `latest` beside a run point at it."""
    pointer = path.parent / f".latest-{os.getpid()}"
    pointer.unlink(missing_ok=True)
    pointer.symlink_to(path.name)
    pointer.replace(path.parent / "latest")
