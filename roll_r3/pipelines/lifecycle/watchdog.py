"""Watchdog that ends the process if a signal does not, because the main thread hangs in a library."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import threading
import time
from collections.abc import Callable

import psutil

WATCHED = {signal.SIGTERM: "SIGTERM", signal.SIGINT: "Ctrl-C"}
"""Names of the signals that end the process."""


class Watchdog:
    """A thread that receives signals even while the main thread runs no Python, as in a call of Ray's.

    The interpreter's own handler writes each signal's number to a socket at once. Python's handlers run only when the
    main thread comes back.
    """

    def __init__(self, first_s: float, second_s: float, end: Callable[[int], None] | None = None) -> None:
        """
        Args:
            first_s: seconds from the first signal to the end at the latest.
            second_s: the same from any later one.
            end: ends this process with an exit status.
        """
        self._first_s, self._second_s = first_s, second_s
        self._end = end or end_at_once
        self._before = -1
        self._told: socket.socket | None = None

    def start(self) -> None:
        """For the main thread."""
        hears, self._told = socket.socketpair()
        self._told.setblocking(False)
        self._before = signal.set_wakeup_fd(self._told.fileno(), warn_on_full_buffer=False)
        threading.Thread(target=self._watch, args=(hears,), name="watchdog", daemon=True).start()

    def stop(self) -> None:
        """Stop watching; for the main thread. The process stays."""
        assert self._told is not None, "start() comes first"
        signal.set_wakeup_fd(self._before)
        self._told.close()

    def _watch(self, hears: socket.socket) -> None:
        deadline, last = None, 0
        while True:
            hears.settimeout(None if deadline is None else max(0.001, deadline - time.monotonic()))
            try:
                numbers = hears.recv(64)
            except TimeoutError:
                self._end(last)
                return
            if not numbers:  # stopped
                hears.close()
                return
            for number in numbers:
                if number in WATCHED:
                    until = time.monotonic() + (self._first_s if deadline is None else self._second_s)
                    deadline, last = min(deadline or until, until), number


def end_at_once(number: int) -> None:
    """Kill every process below this one, then end this one as of a signal."""
    name = WATCHED[signal.Signals(number)]
    with contextlib.suppress(OSError):
        os.write(2, f"{name}: the run did not end in time, so its processes are killed\n".encode())
    for child in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):
            child.kill()
    os._exit(128 + number)
