"""Named shared memory left in /dev/shm by killed processes. Linux only; elsewhere there is nothing."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable
from pathlib import Path

_SHM = Path("/dev/shm")


def existing() -> frozenset[str]:
    """Return the paths of all segments."""
    return frozenset(str(path) for path in _SHM.iterdir()) if _SHM.is_dir() else frozenset()


def mapped(pids: Iterable[int], among: Iterable[str]) -> set[str]:
    """Return the paths in `among` mapped by the given processes.

    Compared by inode: a semaphore is created under one name and linked to another, and the kernel shows the first.
    """
    names = {}
    for path in among:
        with contextlib.suppress(OSError):  # it is gone
            names[os.stat(path).st_ino] = path
    found = set()
    for pid in pids:
        with contextlib.suppress(OSError):
            for line in Path(f"/proc/{pid}/maps").read_text(errors="replace").splitlines():
                if f" {_SHM}/" in line and (name := names.get(int(line.split()[4]))):
                    found.add(name)
    return found


def remove(paths: Iterable[str]) -> None:
    """Unlink segments; processes keep those they have mapped. Paths outside shared memory are skipped."""
    for path in map(Path, paths):
        if path.parent == _SHM:
            path.unlink(missing_ok=True)
