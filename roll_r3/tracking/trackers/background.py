"""A thread for each tracker: its library may fail or hang, and the run goes on."""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from typing import Any

from roll_r3.tracking.trackers.base import Row, Start, TrackedRun, Tracker

logger = logging.getLogger(__name__)

WAITING = 4096
"""Most calls waiting for a tracker; with more it is turned off."""
_REASON = 300
"""Most letters of a reason shown."""

Call = Callable[[Tracker], None]


class BackgroundTracker:
    """Tracker in its own thread, for ever off after its first failure."""

    def __init__(
        self,
        name: str,
        start: Start,
        run: TrackedRun,
        kwargs: Mapping[str, Any],
        say: Callable[[str], None],
    ) -> None:
        """
        Args:
            start: opens the tracker's run, in the thread.
            say: receives one message if the tracker fails.
        """
        self._name, self._say = name, say
        self._calls: queue.Queue[Call | None] = queue.Queue(WAITING)
        self._off = False
        self._thread = threading.Thread(
            target=self._work, args=(partial(start, run, kwargs), run.earlier), name=f"tracker-{name}", daemon=True
        )
        self._thread.start()

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Record metrics of a step, without waiting."""
        self._put(lambda tracker: tracker.log(step, metrics))

    def log_samples(self, step: int, name: str, rows: Sequence[Row]) -> None:
        """Record samples, without waiting."""
        if rows:
            self._put(lambda tracker: tracker.log_samples(step, name, rows))

    def close(self, timeout_s: float) -> None:
        """Wait for the end of the tracker's run, for at most this time. A later end comes with the process's."""
        deadline = time.monotonic() + timeout_s
        with suppress(queue.Full):
            self._calls.put(None, timeout=timeout_s)
        self._thread.join(max(0.0, deadline - time.monotonic()))
        if self._thread.is_alive():
            self._fail(f"it did not end within {timeout_s:g} s")

    def _put(self, call: Call) -> None:
        if self._off:
            return
        try:
            self._calls.put_nowait(call)
        except queue.Full:
            self._fail(f"{WAITING} calls wait for it")

    def _work(self, start: Callable[[], Tracker], earlier: Mapping[int, Mapping[str, float]]) -> None:
        try:
            tracker = start()
            if not tracker.continues:
                for step, metrics in earlier.items():
                    tracker.log(step, metrics)
            while not self._off and (call := self._calls.get()) is not None:
                call(tracker)
            tracker.close()
        except (Exception, SystemExit) as error:
            logger.warning("tracker %s failed", self._name, exc_info=True)
            self._fail(f"{type(error).__name__}: {error}")
            self._drain()

    def _drain(self) -> None:
        """Let nobody wait for room in the queue."""
        while not self._calls.empty():
            self._calls.get_nowait()

    def _fail(self, why: str) -> None:
        """Turn the tracker off and report it once."""
        if not self._off:
            self._off = True
            first = (why.splitlines() or [""])[0]
            shown = first if len(first) <= _REASON else f"{first[:_REASON]}..."
            self._say(f"tracker {self._name} is off from here, the run goes on: {shown} (more in logs/driver.log)")
