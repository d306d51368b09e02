"""The directory of a run: output/<exp_name>/<run>/, with output/<exp_name>/latest pointing at it.

What is saved of it may be in a directory of the same name on another disk.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from roll_r3.errors import BusyError

_NO_LOCKS = frozenset({errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP})
"""As of Lustre without its mount option `flock`."""


@dataclass(frozen=True)
class RunDir:
    """Where a run keeps its files."""

    path: Path
    saved: Path
    """Where its checkpoints are, and its weights for transformers: `path`, or the same on another disk."""

    @classmethod
    def create(cls, output_dir: str, exp_name: str, now: datetime, *, saving_dir: str | None = None) -> RunDir:
        """New directories named after the time; two runs that start in one second get different names.

        Args:
            saving_dir: where what is saved goes, if not to `output_dir`.
        """
        stem = now.strftime("%Y%m%d-%H%M%S")
        for attempt in range(1000):
            found = cls._named(output_dir, exp_name, stem if not attempt else f"{stem}-{attempt}", saving_dir)
            if all(_made(folder) for folder in found._folders):
                break
        (found.path / "logs").mkdir()
        _point_at(found.path)
        return found

    @classmethod
    def reopen(cls, output_dir: str, exp_name: str, run: str, *, saving_dir: str | None = None) -> RunDir:
        """The directory of a run that goes on, made if it is not there (its checkpoints may be on another disk)."""
        found = cls._named(output_dir, exp_name, run, saving_dir)
        (found.path / "logs").mkdir(parents=True, exist_ok=True)
        _point_at(found.path)
        return found

    @classmethod
    def _named(cls, output_dir: str, exp_name: str, run: str, saving_dir: str | None) -> RunDir:
        return cls(*(Path(folder).absolute() / exp_name / run for folder in (output_dir, saving_dir or output_dir)))

    @property
    def _folders(self) -> list[Path]:
        """Each once."""
        return list(dict.fromkeys((self.path, self.saved)))

    @contextmanager
    def locked(self, say: Callable[[str], None]) -> Iterator[None]:
        """No other process runs in this directory meanwhile; the lock ends with the process.

        Args:
            say: is told where a disk has no locks.

        Raises:
            BusyError: one does.
        """
        with ExitStack() as stack:
            for folder in self._folders:
                stream = stack.enter_context((folder / ".lock").open("w"))
                try:
                    fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError as error:
                    raise BusyError(f"another process runs in {folder}: end it, or wait for its end") from error
                except OSError as error:
                    if error.errno not in _NO_LOCKS:
                        raise
                    say(f"the disk of {folder} has no locks ({error.strerror}): see that no other process runs there")
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


def _made(folder: Path) -> bool:
    """False: there was one already."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    try:
        folder.mkdir()
    except FileExistsError:
        return False
    return True


def _point_at(path: Path) -> None:
    """Have `latest` beside a run point at it."""
    pointer = path.parent / f".latest-{os.getpid()}"
    pointer.unlink(missing_ok=True)
    pointer.symlink_to(path.name)
    pointer.replace(path.parent / "latest")
