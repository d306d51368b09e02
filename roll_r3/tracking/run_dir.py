"""Directory of a run: output/<exp_name>/<run>/, with the link output/<exp_name>/latest.

Checkpoints and exports may be in a directory of the same name on another disk.
"""

from __future__ import annotations

import errno
import fcntl
import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from roll_r3.errors import BusyError

_NO_LOCKS = frozenset({errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP})
"""Errors of file systems without locks, such as Lustre without its mount option `flock`."""


@dataclass(frozen=True)
class RunDir:
    """Directory of a run's files."""

    path: Path
    saved: Path
    """Directory of checkpoints and exports: `path`, or one of the same name on another disk."""

    @classmethod
    def create(cls, output_dir: str, exp_name: str, now: datetime, *, saving_dir: str | None = None) -> RunDir:
        """Make new directories named by the time; runs started in one second get different names.

        Args:
            saving_dir: parent of the directory of checkpoints, if not `output_dir`.
        """
        stem = now.strftime("%Y%m%d-%H%M%S")
        for attempt in range(1000):
            found = cls._named(output_dir, exp_name, stem if not attempt else f"{stem}-{attempt}", saving_dir)
            if all(_make(folder) for folder in found._folders):
                break
        (found.path / "logs").mkdir()
        _link_latest(found.path)
        return found

    @classmethod
    def reopen(cls, output_dir: str, exp_name: str, run: str, *, saving_dir: str | None = None) -> RunDir:
        """Open the directory of a resumed run. It is made if missing, as the checkpoints may be on another disk."""
        found = cls._named(output_dir, exp_name, run, saving_dir)
        (found.path / "logs").mkdir(parents=True, exist_ok=True)
        _link_latest(found.path)
        return found

    @classmethod
    def _named(cls, output_dir: str, exp_name: str, run: str, saving_dir: str | None) -> RunDir:
        return cls(*(Path(folder).absolute() / exp_name / run for folder in (output_dir, saving_dir or output_dir)))

    @property
    def _folders(self) -> list[Path]:
        """Both directories, without repetition."""
        return list(dict.fromkeys((self.path, self.saved)))

    @contextmanager
    def locked(self, say: Callable[[str], None]) -> Iterator[None]:
        """Lock the directory against other processes; the lock ends with the process.

        Args:
            say: receives a message if a disk has no locks.

        Raises:
            BusyError: another process holds the lock.
        """
        with ExitStack() as stack:
            for folder in self._folders:
                stream = stack.enter_context((folder / ".lock").open("w"))
                try:
                    fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError as error:
                    raise BusyError(f"another process runs in {folder}: stop it, or wait until it ends") from error
                except OSError as error:
                    if error.errno not in _NO_LOCKS:
                        raise
                    say(f"the disk of {folder} has no locks ({error.strerror}): ensure no other process runs there")
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
    def validation_file(self) -> Path:
        return self.path / "validation.jsonl"


def _make(folder: Path) -> bool:
    """Make a directory; returns False if it exists."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    try:
        folder.mkdir()
    except FileExistsError:
        return False
    return True


def _link_latest(path: Path) -> None:
    """Point the link `latest` at a run."""
    pointer = path.parent / f".latest-{os.getpid()}"
    pointer.unlink(missing_ok=True)
    pointer.symlink_to(path.name)
    pointer.replace(path.parent / "latest")
