"""What a run leaves behind: processes, the ports they listen on, shared memory. Read from /proc; Linux only.

Everything that is started within a block carries a token in its environment, and its children inherit it. Ray's and
SGLang's processes give themselves a title, which overwrites what /proc shows of their environment, and they may lose
their parent, so the processes are also looked for while the block runs: who was seen with the token once, or as the
child of one who was, belongs to it for good. So does the shared memory that they were seen to have: others on the
machine have theirs.
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
"""The environment's variable. Its value names the blocks from the outermost to the innermost."""
LOOK_EVERY = 0.5
"""Seconds."""
LOOKS_A_LOOK_AT_MEMORY = 4
"""It costs more, and whose memory is left has had it for long."""
GRACE = 60.0
"""Seconds that what was started has to be gone, from the block's end on; on a busy machine too."""
_PROC, _SHM = Path("/proc"), Path("/dev/shm")
_LISTENS = "0A"
_MAPPED = re.compile(rb" (\d+) +/dev/shm/")


@dataclass(frozen=True)
class _Stat:
    """Of a process, as /proc/<pid>/stat has it."""

    pid: int
    parent: int
    started: int
    """With the process id it names one process for ever."""


class Descendants:
    """Every process that is started with `token` in its environment, and their children.

    It looks for them until it is closed, or until its block ends.
    """

    def __init__(self) -> None:
        self.token = "/".join(filter(None, [os.environ.get(TOKEN), uuid4().hex]))
        self._mark = f"{TOKEN}={self.token}".encode()
        self._seen: dict[int, int] = {}
        """Process id -> when it started."""
        self._before = _segments()
        self._held: set[int] = set()
        """Inodes of the shared memory that they were seen to have."""
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._look_on, daemon=True)
        self._thread.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Look no more."""
        self._stop.set()
        self._thread.join()

    def _look_on(self) -> None:
        looks = 0
        while not self._stop.wait(LOOK_EVERY):
            pids, looks = self.alive(), looks + 1
            if looks % LOOKS_A_LOOK_AT_MEMORY == 0:
                self._held |= _memory_of(pids)

    def alive(self) -> list[int]:
        """The process ids of those that run; a zombie has nothing any more."""
        running = {stat.pid: stat for path in _PROC.iterdir() if path.name.isdigit() and (stat := _stat(path))}
        with self._lock:
            known = {pid for pid, started in self._seen.items() if pid in running and running[pid].started == started}
            new = {pid for pid in running if pid not in known and self._has_token(pid)}
            # a child of theirs may have a title already; the oldest come first, so that its own children follow
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
        """End all of them."""
        while pids := self.alive():
            for pid in pids:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            time.sleep(0.05)

    def left(self, grace: float = GRACE, *, may_stay: tuple[str, ...] = ()) -> list[str]:
        """What is still there after `grace` seconds, each in words; returns as soon as there is nothing.

        Args:
            may_stay: beginnings of the commands of processes that are not waited for.
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
    """Fail unless everything that the block starts is gone, `grace` seconds after its end at the latest.

    When the block itself fails, what it has started is ended and its own error is the one that is seen.
    """
    resource_tracker.ensure_running()  # this process's own, which stays; it is not to be started within the block
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
    """None: it is gone, or a zombie."""
    with suppress(OSError):
        # the name in brackets may hold anything
        fields = (process / "stat").read_text(errors="replace").rpartition(")")[2].split()
        if fields[0] not in "ZX":
            return _Stat(int(process.name), int(fields[1]), int(fields[19]))
    return None


def _command(pid: int) -> str:
    with suppress(OSError):
        return (_PROC / str(pid) / "cmdline").read_bytes().rstrip(b"\0").replace(b"\0", b" ").decode()[:200]
    return "?"


def _links(pid: int) -> set[str]:
    """What the open files of a process are."""
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
    """Path -> inode: a semaphore is mapped under another name than the one that it gets."""
    segments = {}
    for entry in os.scandir(_SHM) if _SHM.is_dir() else ():
        with suppress(OSError):
            segments[entry.path] = entry.inode()
    return segments


def _memory_of(pids: Iterable[int]) -> set[int]:
    """Inodes of the shared memory that these processes have open or mapped."""
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
