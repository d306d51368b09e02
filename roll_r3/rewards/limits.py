"""Limits of processor time and memory for foreign code in the main thread of this process."""

from __future__ import annotations

import math
import resource
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

_REPEAT_S = 0.1
"""Interval of raising the time limit again, in case the code swallowed the exception."""
_KILL_AFTER_S = 1
"""Seconds past the limit until the kernel kills the process, as C code may ignore Python's signals."""


@contextmanager
def limits(seconds: float, memory: int, exceeded: type[BaseException]) -> Iterator[None]:
    """Limit the resources of the block. If the block never returns to Python, the kernel kills the process (SIGXCPU).

    Args:
        seconds: processor time of this process, independent of other load on the machine.
        memory: bytes beyond the present use; MemoryError is raised past them (Linux).
        exceeded: exception to raise after the time.
    """
    running = True

    def late(*_: Any) -> None:
        if running:
            raise exceeded(f"took longer than {seconds:g} s")

    before = signal.signal(signal.SIGPROF, late)
    kill_at = math.ceil(time.process_time() + seconds) + _KILL_AFTER_S
    with _soft(resource.RLIMIT_CPU, kill_at), _soft(resource.RLIMIT_DATA, _data_bytes() + memory):
        signal.setitimer(signal.ITIMER_PROF, seconds, _REPEAT_S)
        try:
            yield
        finally:
            running = False
            signal.setitimer(signal.ITIMER_PROF, 0)
            signal.signal(signal.SIGPROF, before)


@contextmanager
def _soft(which: int, value: int) -> Iterator[None]:
    """Lower a soft limit for the block."""
    soft, hard = resource.getrlimit(which)
    allowed = [limit for limit in (soft, hard) if limit != resource.RLIM_INFINITY]
    resource.setrlimit(which, (min([value, *allowed]), hard))
    try:
        yield
    finally:
        resource.setrlimit(which, (soft, hard))


def _data_bytes() -> int:
    """Return the bytes of this process counted by RLIMIT_DATA; 0 on systems other than Linux."""
    with suppress(OSError):
        return int(Path("/proc/self/statm").read_text().split()[5]) * resource.getpagesize()
    return 0
