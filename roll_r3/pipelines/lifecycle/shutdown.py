"""Shutdown on SIGTERM: finish a step that has begun to change weights, save the newest step, and exit in time.

SIGHUP is ignored: a run does not need its terminal.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType
from typing import NoReturn, Self

from roll_r3.pipelines.lifecycle.watchdog import Watchdog

EXIT_STATUS = 128 + signal.SIGTERM
TAKE_DOWN_S = 15.0
"""Seconds of the grace period, at most half of it, reserved for ending the run's processes."""


LATE_S = 2.0
"""Seconds after its deadline at which a process is killed."""


class ImmediateExit(SystemExit):
    """Request to exit without waiting for anything: the grace period is nearly over, or a second SIGTERM came."""

    def __init__(self) -> None:
        super().__init__(EXIT_STATUS)


class GracefulExit(SystemExit):
    """Request to exit after SIGTERM. Never raised between a step's first change of a weight and the step's end."""

    def __init__(self) -> None:
        super().__init__(EXIT_STATUS)


class Shutdown:
    """Handler of SIGTERM while its block runs; for the main thread."""

    def __init__(self, grace_s: float) -> None:
        """
        Args:
            grace_s: seconds from SIGTERM to the end; `ImmediateExit` is raised early enough to end the processes.
        """
        take_down_s = min(TAKE_DOWN_S, grace_s / 2)
        self._wait_s = grace_s - take_down_s
        self._watchdog = Watchdog(grace_s + LATE_S, take_down_s + LATE_S)
        self.asked = False
        """True once SIGTERM came."""
        self._held = False
        self._raised: GracefulExit | ImmediateExit | None = None
        """Raised by the newest signal."""
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

    def raise_if_asked(self) -> None:
        """Raise `GracefulExit` after a SIGTERM whose exception was lost.

        Python ignores exceptions in some callbacks, such as those around a fork, of which a start makes many.
        """
        if self.asked and not self._held:
            self._raise(GracefulExit())

    @contextmanager
    def as_raised(self) -> Iterator[None]:
        """Raise from the block exactly the exit of a signal. An interrupted call of Ray's replaces it by its own."""
        try:
            yield
        except SystemExit as error:
            if self._raised is None or isinstance(error, GracefulExit | ImmediateExit):
                raise
            raise self._raised from error

    @contextmanager
    def held(self) -> Iterator[None]:
        """Raise `GracefulExit` at the end of the block, for a SIGTERM during the block or before it."""
        self._held = True
        try:
            with self.as_raised():
                yield
        finally:
            self._held = False
        if self.asked:
            raise GracefulExit

    @contextmanager
    def unbroken(self) -> Iterator[None]:
        """Hold a SIGTERM back until the end of the block, and raise `GracefulExit` there. For quick blocks.

        Only the main thread sees signals.
        """
        if self._held or threading.current_thread() is not threading.main_thread():
            yield
            return
        before, self._held = self.asked, True
        try:
            yield
        finally:
            self._held = False
        if self.asked and not before:
            self._raise(GracefulExit())

    def _on_term(self, signum: int, frame: FrameType | None) -> None:
        if self.asked:
            self._raise(ImmediateExit())
        self.asked = True
        signal.setitimer(signal.ITIMER_REAL, self._wait_s)
        if not self._held:
            self._raise(GracefulExit())

    def _on_alarm(self, signum: int, frame: FrameType | None) -> None:
        self._raise(ImmediateExit())

    def _raise(self, error: GracefulExit | ImmediateExit) -> NoReturn:
        self._raised = error
        raise error
