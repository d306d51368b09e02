"""Leftovers of a run: processes, their listening ports, shared memory. Read from /proc; Linux only.

Every process started within a block carries a token in its environment, and its children inherit the token. Ray's and
SGLang's processes set a title, which overwrites their environment in /proc, and they may lose their parent. Therefore
the processes are also polled while the block runs: a process seen once with the token, or as the child of such a
process, belongs to the block for good. The same holds for shared memory seen in these processes; other segments belong
to other programs on the machine.
"""

from __future__ import annotations

import os
import re
import signal
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from multiprocessing import resource_tracker
from pathlib import Path
from typing import Self
from uuid import uuid4

TOKEN = "ROLL_R3_TEST_TOKEN"
"""Environment variable. Its value names the blocks from the outermost to the innermost."""
POLL_SECONDS = 0.5
"""Seconds between two polls of the processes."""
POLLS_PER_MEMORY_POLL = 4
"""Polls of the processes for each poll of their memory, which costs more; leftover memory has been held for long."""
GRACE = 60.0
"""Seconds allowed for everything to disappear after the end of the block, sufficient on a busy machine."""
_PROC, _SHM = Path("/proc"), Path("/dev/shm")
_LISTENS = "0A"
_MAPPED = re.compile(rb" (\d+) +/dev/shm/")


@dataclass(frozen=True)
class _Stat:
    """Fields of a process from /proc/<pid>/stat."""

    pid: int
    parent: int
    started: int
    """Start time; together with the process id it identifies one process for ever."""


class Descendants:
    """Processes started with `token` in their environment, and their children.

    Polls until it is closed, or until its block ends.
    """

    def __init__(self) -> None:
        self.token = "/".join(filter(None, [os.environ.get(TOKEN), uuid4().hex]))
        self._mark = f"{TOKEN}={self.token}".encode()
        self._seen: dict[int, int] = {}
        """Process id -> start time."""
        self._before = _segments()
        self._held: set[int] = set()
        """Inodes of shared memory seen in these processes."""
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._look_on, daemon=True)
        self._thread.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Stop polling."""
        self._stop.set()
        self._thread.join()

    def _look_on(self) -> None:
        looks = 0
        while not self._stop.wait(POLL_SECONDS):
            pids, looks = self.alive(), looks + 1
            if looks % POLLS_PER_MEMORY_POLL == 0:
                self._held |= _memory_of(pids)

    def alive(self) -> list[int]:
        """Return the ids of running processes; a zombie holds nothing any more."""
        running = {stat.pid: stat for path in _PROC.iterdir() if path.name.isdigit() and (stat := _stat(path))}
        with self._lock:
            known = {pid for pid, started in self._seen.items() if pid in running and running[pid].started == started}
            new = {pid for pid in running if pid not in known and self._has_token(pid)}
            # a child may already have a title; the oldest come first, so its own children follow
            for stat in sorted(running.values(), key=lambda stat: stat.started):
                if stat.parent in known | new:
                    new.add(stat.pid)
            self._seen |= {pid: running[pid].started for pid in new}
            return sorted(known | new)

    def _has_token(self, pid: int) -> bool:
        with suppress(OSError):
            return self._mark in (_PROC / str(pid) / "environ").read_bytes()
        return False

    def kill(self) -> None:
        """Kill all of them."""
        while pids := self.alive():
            for pid in pids:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            time.sleep(0.05)

    def left(self, grace: float = GRACE, *, may_stay: tuple[str, ...] = ()) -> list[str]:
        """Return a description of each leftover after `grace` seconds; return at once when nothing is left.

        Args:
            may_stay: beginnings of commands of processes not waited for.
        """
        deadline = time.monotonic() + grace
        while (left := self._left(may_stay)) and time.monotonic() < deadline:
            time.sleep(0.2)
        return left

    def _left(self, may_stay: tuple[str, ...]) -> list[str]:
        left = []
        for pid in self.alive():
            if may_stay and _command(pid).startswith(may_stay):
                continue
            ports = "".join(f", listens on port {port}" for port in _ports(pid))
            left.append(f"process {pid} ({_command(pid)}){ports}")
        segments = _segments()
        mine = {path for path, inode in segments.items() if inode in self._held and self._before.get(path) != inode}
        if mine:
            used = _memory_of([int(process.name) for process in _PROC.iterdir() if process.name.isdigit()])
            left += [f"shared memory {path}" for path in sorted(mine) if segments[path] not in used]
        return left


@contextmanager
def nothing_left(grace: float = GRACE) -> Iterator[Descendants]:
    """Fail unless everything started by the block is gone within `grace` seconds after its end.

    If the block itself fails, its processes are killed and its own error is shown.
    """
    resource_tracker.ensure_running()  # this process's own tracker stays; start it before the block
    with Descendants() as descendants:
        outer = os.environ.get(TOKEN)
        os.environ[TOKEN] = descendants.token
        try:
            yield descendants
            left = descendants.left(grace)
            assert left == [], "left behind:\n" + "\n".join(left)
        finally:
            descendants.kill()
            if outer is None:
                del os.environ[TOKEN]
            else:
                os.environ[TOKEN] = outer


def _stat(process: Path) -> _Stat | None:
    """Return None for a zombie or a missing process."""
    with suppress(OSError):
        # the name in brackets may contain any character
        fields = (process / "stat").read_text(errors="replace").rpartition(")")[2].split()
        if fields[0] not in "ZX":
            return _Stat(int(process.name), int(fields[1]), int(fields[19]))
    return None


def _command(pid: int) -> str:
    with suppress(OSError):
        return (_PROC / str(pid) / "cmdline").read_bytes().rstrip(b"\0").replace(b"\0", b" ").decode()[:200]
    return "?"


def _links(pid: int) -> set[str]:
    """Return the targets of a process's open files."""
    links = set()
    with suppress(OSError):
        for file in (_PROC / str(pid) / "fd").iterdir():
            with suppress(OSError):
                links.add(os.readlink(file))
    return links


def _ports(pid: int) -> list[int]:
    sockets = {link for link in _links(pid) if link.startswith("socket:")}
    ports = set()
    for table in ("tcp", "tcp6"):
        with suppress(OSError):
            for line in (_PROC / str(pid) / "net" / table).read_text().splitlines()[1:]:
                fields = line.split()
                if fields[3] == _LISTENS and f"socket:[{fields[9]}]" in sockets:
                    ports.add(int(fields[1].rpartition(":")[2], 16))
    return sorted(ports)


def _segments() -> dict[str, int]:
    """Return path -> inode: a semaphore is mapped under another name than its final one."""
    segments = {}
    for entry in os.scandir(_SHM) if _SHM.is_dir() else ():
        with suppress(OSError):
            segments[entry.path] = entry.inode()
    return segments


def _memory_of(pids: Iterable[int]) -> set[int]:
    """Return the inodes of shared memory opened or mapped by these processes."""
    inodes = set()
    for pid in pids:
        process = _PROC / str(pid)
        with suppress(OSError):
            inodes |= {int(inode) for inode in _MAPPED.findall((process / "maps").read_bytes())}
        with suppress(OSError):
            for file in (process / "fd").iterdir():
                with suppress(OSError):
                    if os.readlink(file).startswith(f"{_SHM}/"):
                        inodes.add(file.stat().st_ino)
    return inodes
