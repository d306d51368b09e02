"""SIGTERM: a step that has begun to change weights is finished, the newest is saved, and the process leaves in time.

SIGHUP does nothing: a run does not need its terminal.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType
from typing import NoReturn, Self

from roll_r3.pipelines.watchdog import Watchdog

EXIT_STATUS = 128 + signal.SIGTERM
TAKE_DOWN_S = 15.0
"""Seconds of the grace period, at most half of it, that are kept back for ending the run's processes."""


LATE_S = 2.0
"""Seconds after its time that a process is killed which has not left."""


class LeaveNow(SystemExit):
    """Nothing is waited for any more: the grace period is all but over, or a second SIGTERM came."""

    def __init__(self) -> None:
        super().__init__(EXIT_STATUS)


class Leave(SystemExit):
    """SIGTERM came. Never raised between a step's first change of a weight and the end of what belongs to the step."""

    def __init__(self) -> None:
        super().__init__(EXIT_STATUS)


class Leaving:
    """Takes SIGTERM for as long as its block runs; for the main thread."""

    def __init__(self, grace_s: float) -> None:
        """
        Args:
            grace_s: seconds from SIGTERM to the end; `LeaveNow` comes before it, in time for the processes to be ended.
        """
        take_down_s = min(TAKE_DOWN_S, grace_s / 2)
        self._wait_s = grace_s - take_down_s
        self._watchdog = Watchdog(grace_s + LATE_S, take_down_s + LATE_S)
        self.asked = False
        """SIGTERM came."""
        self._held = False
        self._raised: Leave | LeaveNow | None = None
        """By the newest signal."""
        self._previous: dict[int, object] = {}

    def __enter__(self) -> Self:
        for number, handler in ((signal.SIGTERM, self._on_term), (signal.SIGALRM, self._on_alarm)):
            self._previous[number] = signal.signal(number, handler)
        # ignored, not handled: what this process starts inherits that
        self._previous[signal.SIGHUP] = signal.signal(signal.SIGHUP, signal.SIG_IGN)
        self._watchdog.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._watchdog.stop()
        signal.setitimer(signal.ITIMER_REAL, 0)
        for number, handler in self._previous.items():
            signal.signal(number, handler)  # type: ignore[arg-type]  # what signal.signal returned
        if isinstance(error, SystemExit):
            with self.as_raised():
                raise error

    @contextmanager
    def as_raised(self) -> Iterator[None]:
        """Out of the block comes what a signal raised in it, also where it interrupted a call of Ray's, which raises a
        SystemExit of its own in its place."""
        try:
            yield
        except SystemExit as error:
            if self._raised is None or isinstance(error, Leave | LeaveNow):
                raise
            raise self._raised from error

    @contextmanager
    def held(self) -> Iterator[None]:
        """A SIGTERM that comes while the block runs, or came before it, raises `Leave` at its end."""
        self._held = True
        try:
            with self.as_raised():
                yield
        finally:
            self._held = False
        if self.asked:
            raise Leave

    @contextmanager
    def unbroken(self) -> Iterator[None]:
        """A SIGTERM that comes while the block runs raises `Leave` at its end. For what is quick; a thread that is not
        the main one never sees a signal."""
        if self._held or threading.current_thread() is not threading.main_thread():
            yield
            return
        before, self._held = self.asked, True
        try:
            yield
        finally:
            self._held = False
        if self.asked and not before:
            self._raise(Leave())

    def _on_term(self, signum: int, frame: FrameType | None) -> None:
        if self.asked:
            self._raise(LeaveNow())
        self.asked = True
        signal.setitimer(signal.ITIMER_REAL, self._wait_s)
        if not self._held:
            self._raise(Leave())

    def _on_alarm(self, signum: int, frame: FrameType | None) -> None:
        self._raise(LeaveNow())

    def _raise(self, error: Leave | LeaveNow) -> NoReturn:
        self._raised = error
        raise error
