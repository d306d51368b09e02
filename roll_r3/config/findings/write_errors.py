"""Messages about failed writes: the file, its disk, and a remedy."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

FULL = frozenset({errno.ENOSPC, errno.EDQUOT})
REFUSED = frozenset({errno.EACCES, errno.EPERM, errno.EROFS})
CANNOT_CREATE = REFUSED | {errno.ENOENT, errno.ENOTDIR, errno.ENAMETOOLONG, errno.ELOOP}
"""Errors of creating a directory that a retry cannot fix."""


@contextmanager
def with_filename(path: Path) -> Iterator[None]:
    """Add `path` to an OSError of the block without a file name, as raised by a write."""
    try:
        yield
    except OSError as error:
        if error.filename is None and error.errno is not None:
            error.filename = str(path)
        raise


def explain(error: OSError) -> str:
    """Return a message about a failed write: file, disk, and remedy; at most two lines."""
    if error.errno not in FULL | REFUSED or not isinstance(error.filename, str):
        return str(error)
    disk = disk_of(Path(error.filename))
    if error.errno in FULL:
        todo = f"Free space on the disk {disk}"
    elif error.errno == errno.EROFS:
        todo = f"Have the disk {disk} mounted for writing"
    else:
        todo = f"Let user {os.getuid()} write there, on the disk {disk}"
    return f"{error}\n{todo}, and restart the run: resume_from_checkpoint: auto resumes from the newest checkpoint"


def disk_of(path: Path) -> str:
    """Return the mount point of a path's disk, and its free space."""
    try:
        folder = next(p for p in (path.absolute(), *path.absolute().parents) if p.exists())
        usage, device = shutil.disk_usage(folder), folder.stat().st_dev
        mount = folder
        for parent in folder.parents:
            if parent.stat().st_dev != device:
                break
            mount = parent
    except (OSError, StopIteration):
        return f"of {path}"
    return f"{mount} ({usage.free / 1e6:.0f} of {usage.total / 1e6:.0f} MB are free)"
