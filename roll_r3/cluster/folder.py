"""Directory of a Ray started by a run: closed to other users, and removed with the run.

Ray makes everything in it writable by everyone, whatever the umask, so the directory around it must be closed.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from pathlib import Path

import psutil
from ray._common.utils import get_default_system_temp_dir

from roll_r3.engines.folders import here

_BEGIN = "r3-ray-"
_MAKER = "maker"
"""File in the directory with the process id of its maker and the namespace of that id."""
_MAX_MAKER = 64
_RAYS_OWN = "r"
"""In the directory: Ray's, with mode 0777."""
_SOCKET_LIMIT = 107
"""Bytes of a Unix socket's path."""
_BELOW = len("/session_2026-11-30_00-00-00_000000_4194304/sockets/plasma_store")


class RayFolder:
    """A new directory, for the time of a block or until `remove`."""

    def __init__(self) -> None:
        """Raises OSError: it cannot be made."""
        remove_orphaned()
        self.path = Path(tempfile.mkdtemp(prefix=_BEGIN, dir=_base()))  # mode 0700
        (self.path / _MAKER).write_text(f"{here()} {os.getpid()}\n")

    @property
    def temp_dir(self) -> str:
        """For Ray's `_temp_dir`."""
        return str(self.path / _RAYS_OWN)

    def remove(self) -> None:
        shutil.rmtree(self.path, ignore_errors=True)

    def keep(self) -> None:
        """Keep it, with Ray's logs, for finding out why Ray failed."""
        (self.path / _MAKER).unlink(missing_ok=True)


def _base() -> str:
    """Parent of Ray's directory: the default place, or /tmp if a socket's path would be too long."""
    base = get_default_system_temp_dir()
    length = len(os.fsencode(base)) + len(f"/{_BEGIN}12345678/{_RAYS_OWN}") + _BELOW
    return base if length <= _SOCKET_LIMIT or "RAY_TMPDIR" in os.environ else "/tmp"


def remove_orphaned() -> None:
    """Return directories whose makers were killed before removing them; only this user's on this machine."""
    if not (place := here()):
        return
    for folder in Path(_base()).glob(f"{_BEGIN}*"):
        with contextlib.suppress(OSError, ValueError):
            if folder.lstat().st_uid != os.getuid() or folder.is_symlink():
                continue
            with (folder / _MAKER).open("rb") as stream:
                where, pid = stream.read(_MAX_MAKER).decode().split()
            if where == place and not psutil.pid_exists(int(pid)):
                shutil.rmtree(folder, ignore_errors=True)
