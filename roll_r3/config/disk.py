"""What stands at a path that a user wrote, whatever that is: no such question raises, or waits for a pipe."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path

NOTHING = os.strerror(errno.ENOENT)
"""What is said where there is nothing."""


def is_file(path: Path) -> bool:
    """Whether a regular file is there and may be looked at."""
    return not why_no_file(path)


def is_directory(path: Path) -> bool:
    """Whether a directory is there and may be looked at."""
    mode = _mode(path)
    return isinstance(mode, int) and stat.S_ISDIR(mode)


def why_no_file(path: Path) -> str:
    """Why there is no regular file to read at `path`, in a few words; empty when there is one."""
    mode = _mode(path)
    if isinstance(mode, str):
        return mode
    if stat.S_ISDIR(mode):
        return os.strerror(errno.EISDIR)
    return "" if stat.S_ISREG(mode) else "it is a pipe or a device, not a file"


def read_at_most(path: Path, most: int) -> bytes:
    """The bytes of a regular file.

    Raises:
        OSError: it cannot be read, is a pipe or a device, or has more than `most` bytes.
    """
    if why := why_no_file(path):
        raise OSError(f"{path}: {why}")
    with path.open("rb") as stream:
        size = os.fstat(stream.fileno()).st_size
        content = stream.read(min(size, most) + 1)  # memory is taken for as much as is asked for
    if len(content) > most:
        raise OSError(f"{path}: it has more than {most} bytes")
    return content


def unseen(path: Path) -> str:
    """Why it cannot be known what stands at `path`; empty when it can, or when nothing does."""
    mode = _mode(path)
    return mode if isinstance(mode, str) and mode != NOTHING else ""


def matches(directory: Path, pattern: str) -> list[Path]:
    """The paths below `directory` that match a glob pattern, sorted; none where they may not be looked at."""
    try:
        return sorted(directory.glob(pattern))
    except (OSError, ValueError):
        return []


def _mode(path: Path) -> int | str:
    """The mode of what is there, links followed, or why that cannot be told."""
    try:
        return os.stat(path).st_mode
    except (FileNotFoundError, NotADirectoryError):
        return NOTHING
    except OSError as error:
        return error.strerror or str(error)
    except ValueError as error:
        return str(error)
