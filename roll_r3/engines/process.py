"""A server as a child process: its log, its exit, and its end with everything it started. No engine is named here."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import socket
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import psutil

from roll_r3.engines import folders, segments
from roll_r3.errors import EngineError
from roll_r3.processes import FOLDER_VARIABLE

logger = logging.getLogger(__name__)

GRACE_S = 8.0
"""Seconds for a server to end in order."""
_POLL_S = 0.1
_GONE_S = 10.0
"""Seconds for the kernel to end a killed process; one with a GPU has much memory to free."""
_LOG_TAIL_BYTES = 64 * 1024
_NOTE_S = 0.5
"""Seconds between two looks at the shared memory of a starting server. Memory made between the last look and its death
stays there."""


def free_port(host: str) -> int:
    """Return a port of `host` without a listener. Another process may still bind it first."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.bind((host, 0))
        return int(probe.getsockname()[1])


class ServerProcess:
    """One child in a process group of its own, with all its output in a log file.

    It has a directory of its own, named by `FOLDER_VARIABLE` in its environment. The child is polled, not awaited
    through the event loop's child watcher: polling works in any thread and under any event loop, and notices an exit
    within a tenth of a second.
    """

    def __init__(self, name: str, log_path: Path, *, hide: str = "") -> None:
        """
        Args:
            name: for messages ("engine 0").
            log_path: opened for appending; its directory is created.
            hide: secret to replace in the result of `log_tail`.
        """
        self._name = name
        self.log_path = log_path
        self._hide = hide
        self._process: subprocess.Popen[bytes] | None = None
        self._log_start = 0
        self._death: asyncio.Task[int] | None = None
        self._segments_before: frozenset[str] = frozenset()
        self._segments: set[str] = set()
        self._folder: Path | None = None
        self._starting = False
        """True while its shared memory may grow."""
        self._all_gone = False
        """True once its process group is gone: the number may belong to another group by now."""

    def launch(self, command: Sequence[str], environment: Mapping[str, str]) -> None:
        """Start the child and its watch; needs a running event loop. Leftovers of the previous child are removed.

        The calling thread must live as long as the child, if the child has the kernel kill it with its parent.

        Raises:
            EngineError: the program does not exist or may not be run, or the disk has no room for its log or directory.
        """
        assert self._process is None or self._process.poll() is not None, "the previous child is still running"
        self._remove_what_it_left()
        try:
            folders.remove_orphaned()
            self._segments_before = segments.existing()  # without leftovers, which were just removed
            self._folder = folders.make()
            self.log_path.parent.mkdir(parents=True, exist_ok=True)
            with self.log_path.open("ab") as log:
                self._log_start = log.tell()
                self._process = subprocess.Popen(
                    list(command),
                    env={**environment, FOLDER_VARIABLE: str(self._folder)},
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                )
        except OSError as error:
            self._remove_what_it_left()
            raise EngineError(f"{self._name}: cannot run {command[0]}: {error}") from error
        self._all_gone, self._starting = False, True
        self._death = asyncio.create_task(self._watch(self._process))

    async def _watch(self, process: subprocess.Popen[bytes]) -> int:
        look_at = 0.0
        while (code := process.poll()) is None:
            if self._starting and time.monotonic() >= look_at:
                self._note_shared_memory()
                look_at = time.monotonic() + _NOTE_S
            await asyncio.sleep(_POLL_S)
        return code

    @property
    def pid(self) -> int | None:
        return None if self._process is None else self._process.pid

    @property
    def death(self) -> asyncio.Task[int]:
        """Task of the child's exit. Its result is the exit code (negative: the signal)."""
        assert self._death is not None, "launch() comes first"
        return self._death

    @property
    def running(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def started(self) -> None:
        """Stop looking for shared memory: the child and its children have all they will use."""
        self._note_shared_memory()
        self._starting = False

    def _note_shared_memory(self) -> None:
        """Record the shared memory of the child and its children.

        If they are killed before they can remove it, `stop` or the next `launch` does. If this process is killed too,
        the next launch by any process does.
        """
        if self._process is None or self._folder is None:
            return
        existing = segments.existing()
        new = existing - self._segments_before - self._segments
        held = (self._segments & existing) | (segments.mapped(_living(self._process.pid), new) if new else set())
        if held != self._segments:
            self._segments = held
            folders.note(self._folder, held)

    def log_tail(self, lines: int = 20) -> str:
        """Return the last lines of this child's output."""
        if not self.log_path.exists():
            return ""
        with self.log_path.open("rb") as log:
            size = log.seek(0, os.SEEK_END)
            log.seek(max(self._log_start, size - _LOG_TAIL_BYTES))
            text = log.read().decode(errors="replace")
        if self._hide:
            text = text.replace(self._hide, "<hidden>")
        return "\n".join(text.splitlines()[-lines:])

    def obituary(self) -> str:
        """Return how the child ended, and the end of its log, for an error message."""
        code = None if self._process is None else self._process.poll()
        if code is None:
            how = "is not running" if self._process is None else "is still running"
        elif code < 0:
            how = f"was killed by {signal.Signals(-code).name}"
        else:
            how = f"exited with code {code}"
        return f"process {self.pid} {how}; the end of {self.log_path}:\n{self.log_tail()}"

    async def stop(self, grace_s: float = GRACE_S) -> None:
        """End the whole process group: SIGTERM, wait `grace_s`, SIGKILL, and wait until all are gone.

        Without a grace period they are killed at once. Safe to call twice. Their shared memory and their directory are
        removed, and a successor finds the devices' memory free.
        """
        process = self._process
        if process is None or self._all_gone:
            return
        self._note_shared_memory()
        self._starting = False
        if grace_s:
            signal_group(process.pid, signal.SIGTERM)
            await asyncio.wait([self.death], timeout=grace_s)
        # Children that outlived the leader are still in its group, so this is needed even if the leader ended.
        signal_group(process.pid, signal.SIGKILL)
        # Now: this process may be ended before all of them are gone.
        self._remove_what_it_left()
        deadline = time.monotonic() + _GONE_S
        while (left := _living(process.pid)) and time.monotonic() < deadline:
            await asyncio.sleep(_POLL_S)
        self._all_gone = not left
        if left:
            logger.warning("%s: processes %s survive SIGKILL", self._name, left)
        else:
            await asyncio.wait([self.death], timeout=_GONE_S)

    def _remove_what_it_left(self) -> None:
        segments.remove(self._segments)
        self._segments.clear()
        if self._folder is not None:
            folders.remove(self._folder)
            self._folder = None


def _living(group: int) -> list[int]:
    """Return the processes of a group, without zombies."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(ProcessLookupError, psutil.NoSuchProcess):
            if os.getpgid(process.pid) == group and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process.pid)
    return found


def signal_group(group: int, number: signal.Signals) -> None:
    """Send a signal to every process of a group. The group may be gone."""
    with contextlib.suppress(ProcessLookupError):  # all of it is gone already
        os.killpg(group, number)
