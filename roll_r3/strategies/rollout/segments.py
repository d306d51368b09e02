"""Named shared memory: what processes that are killed leave in /dev/shm. Linux only; elsewhere there is nothing."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable
from pathlib import Path

_SHM = Path("/dev/shm")


def existing() -> frozenset[str]:
    """Paths of all that there are."""
    return frozenset(str(path) for path in _SHM.iterdir()) if _SHM.is_dir() else frozenset()


def mapped(pids: Iterable[int]) -> set[str]:
    """Paths of those that processes have mapped."""
    found = set()
    for pid in pids:
        with contextlib.suppress(OSError):  # it is gone
            for line in Path(f"/proc/{pid}/maps").read_text(errors="replace").splitlines():
                start = line.find(f"{_SHM}/")
                if start >= 0 and not line.endswith(" (deleted)"):
                    found.add(line[start:])
    return found


def remove(paths: Iterable[str]) -> None:
    """Take names away; whoever has the memory mapped keeps it."""
    for path in paths:
        Path(path).unlink(missing_ok=True)
