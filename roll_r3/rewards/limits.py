"""Limits of processor time and memory around code of others that Python runs in this process, in its main thread."""

from __future__ import annotations

import math
import resource
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

_AGAIN_S = 0.1
"""A limit that was passed is raised again after so much more time, should code on the way have swallowed it."""
_KILL_AFTER_S = 1
"""Seconds past the limit at which the kernel kills the process: code in C need not look at signals."""


@contextmanager
def limits(seconds: float, memory: int, passed: type[BaseException]) -> Iterator[None]:
    """Bound what the block may use. Code that does not return to Python is killed with this process (SIGXCPU).

    Args:
        seconds: of this process's processor time, so that others on the machine do not count.
        memory: bytes more than this process has now; past them MemoryError is raised (Linux).
        passed: what is raised when the time has passed.
    """
    running = True

    def late(*_: Any) -> None:
        if running:
            raise passed(f"took longer than {seconds:g} s")

    before = signal.signal(signal.SIGPROF, late)
    kill_at = math.ceil(time.process_time() + seconds) + _KILL_AFTER_S
    with _soft(resource.RLIMIT_CPU, kill_at), _soft(resource.RLIMIT_DATA, _data_bytes() + memory):
        signal.setitimer(signal.ITIMER_PROF, seconds, _AGAIN_S)
        try:
            yield
        finally:
            running = False
            signal.setitimer(signal.ITIMER_PROF, 0)
            signal.signal(signal.SIGPROF, before)


@contextmanager
def _soft(which: int, value: int) -> Iterator[None]:
    """A lower soft limit for the block's time."""
    soft, hard = resource.getrlimit(which)
    allowed = [limit for limit in (soft, hard) if limit != resource.RLIM_INFINITY]
    resource.setrlimit(which, (min([value, *allowed]), hard))
    try:
        yield
    finally:
        resource.setrlimit(which, (soft, hard))


def _data_bytes() -> int:
    """Bytes of this process that count for RLIMIT_DATA; elsewhere than on Linux 0."""
    with suppress(OSError):
        return int(Path("/proc/self/statm").read_text().split()[5]) * resource.getpagesize()
    return 0
