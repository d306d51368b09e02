"""Checks of paths given by a user. They never raise, and never wait for a pipe."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path

MISSING = os.strerror(errno.ENOENT)
"""Message for a path without a file."""


def is_file(path: Path) -> bool:
    """Return true for a regular file with known status."""
    return not why_no_file(path)


def is_directory(path: Path) -> bool:
    """Return true for a directory with known status."""
    mode = _mode(path)
    return isinstance(mode, int) and stat.S_ISDIR(mode)


def why_no_file(path: Path) -> str:
    """Return why there is no regular file to read at `path`; empty if there is one."""
    mode = _mode(path)
    if isinstance(mode, str):
        return mode
    if stat.S_ISDIR(mode):
        return os.strerror(errno.EISDIR)
    return "" if stat.S_ISREG(mode) else "it is a pipe or a device, not a file"


def read_at_most(path: Path, most: int) -> bytes:
    """Return the bytes of a regular file.

    Raises:
        OSError: the file cannot be read, is a pipe or a device, or has more than `most` bytes.
    """
    if why := why_no_file(path):
        raise OSError(f"{path}: {why}")
    with path.open("rb") as stream:
        size = os.fstat(stream.fileno()).st_size
        content = stream.read(min(size, most) + 1)  # read allocates its whole argument
    if len(content) > most:
        raise OSError(f"{path}: it has more than {most} bytes")
    return content


def why_unknown(path: Path) -> str:
    """Return why the status of `path` is unknown; empty if it is known, or if nothing is there."""
    mode = _mode(path)
    return mode if isinstance(mode, str) and mode != MISSING else ""


def matches(directory: Path, pattern: str) -> list[Path]:
    """Return the paths below `directory` that match a glob pattern, sorted; none without permission to list them."""
    try:
        return sorted(directory.glob(pattern))
    except (OSError, ValueError):
        return []


def _mode(path: Path) -> int | str:
    """Return the mode of a path, links followed, or why it is unknown."""
    try:
        return os.stat(path).st_mode
    except (FileNotFoundError, NotADirectoryError):
        return MISSING
    except OSError as error:
        return error.strerror or str(error)
    except ValueError as error:
        return str(error)
