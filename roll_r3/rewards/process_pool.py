"""Pool of processes for reward rules, with a thread of its own to give them tasks at any time.

A user's rule may loop forever, crash its interpreter or start programs. So it runs in a process of its own, to be
killed with its process group, and restarted. A process handles one response at a time, for a time limit per response.
"""

from __future__ import annotations

import os
import threading
import time
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future
from contextlib import suppress
from multiprocessing.connection import wait
from pathlib import Path

from roll_r3.errors import RollError
from roll_r3.rewards.reward_process import POLL_S, Answer, Process, Task
from roll_r3.rewards.rules import Rule

_Waiting = tuple[Task, "Future[Answer]"]


class RewardProcesses:
    """Fixed number of processes. The thread starts them and outlives them: the kernel kills its children with it."""

    def __init__(self, rules: Sequence[Rule], size: int, log_dir: Path) -> None:
        """Prepare the processes without starting them."""
        first_calls: dict[int, float] = {}
        self._processes = [
            Process(number, list(rules), log_dir / f"rewards-{number}.log", first_calls) for number in range(size)
        ]
        self._thread: threading.Thread | None = None
        self._ready: Future[None] = Future()
        self._waiting: deque[_Waiting] = deque()
        self._running: dict[int, Future[Answer]] = {}
        """Number of a task given to a process -> its future."""
        self._given = 0
        """Number of tasks given so far."""
        self._wake, self._woken = -1, -1
        """Ends of the pipe for ending the thread's wait: to write, to read."""
        self._lock = threading.Lock()
        """Held to add tasks or to stop."""
        self._stopped: BaseException | None = None
        """Reason for taking no more tasks."""

    def start(self) -> None:
        """Start the processes, without waiting for them."""
        self._woken, self._wake = os.pipe()
        os.set_blocking(self._woken, False)
        os.set_blocking(self._wake, False)
        self._thread = threading.Thread(target=self._serve, name="rewards", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Kill the processes with their process groups. Open tasks are cancelled."""
        if self._thread is None:
            return
        self._stop(RollError("the reward processes are closed"))
        self._thread.join()
        self._thread = None
        os.close(self._wake)
        os.close(self._woken)

    def wait_until_ready(self) -> None:
        """Wait until every process has imported every rule.

        Raises:
            ConfigError: an import failed, or a rule cannot be called with its kwargs and the offered values.
        """
        self._ready.result()

    def submit(self, tasks: Sequence[Task]) -> list[Future[Answer]]:
        """Queue tasks, and return at once.

        A rule gives a `Failure` if it raises, exceeds its `timeout`, kills its process or returns no finite number.
        A judge gives `Undecided` for most of these. Cancelled futures are left out, unless begun.

        Raises:
            RollError: a restarted process could not import the rules again; of the futures too.
        """
        waiting: list[_Waiting] = [(task, Future()) for task in tasks]
        with self._lock:
            if self._stopped is not None:
                raise self._stopped
            self._waiting.extend(waiting)
        self._end_wait()
        return [future for _, future in waiting]

    def score(self, tasks: Sequence[Task]) -> list[Answer]:
        """Return the answers to all tasks, in their order. Raises as `submit`."""
        return [future.result() for future in self.submit(tasks)]

    def _serve(self) -> None:
        """Run the thread."""
        try:
            for process in self._processes:
                process.start()
            while self._stopped is None:
                if not self._ready.done() and all(process.ready for process in self._processes):
                    self._ready.set_result(None)
                self._give()
                self._wait()
                self._poll()
        except BaseException as error:  # noqa: BLE001  goes to everyone who waits
            self._stop(error)
        finally:
            for process in self._processes:
                process.kill()
            self._break_off()

    def _give(self) -> None:
        for process in self._processes:
            while self._waiting and process.ready and process.task is None:
                task, future = self._waiting[0]
                if not (future.running() or future.set_running_or_notify_cancel()):
                    self._waiting.popleft()
                    continue
                self._given += 1
                if process.give(self._given, task):
                    self._running[self._given] = future
                    self._waiting.popleft()

    def _poll(self) -> None:
        for process in self._processes:
            number, answer = process.task, process.poll()
            if answer is not None:
                assert number is not None
                self._running.pop(number).set_result(answer)

    def _wait(self) -> None:
        """Wait for a message, new tasks, the next deadline, or the next poll."""
        busy = [p for p in self._processes if p.task is not None or not p.ready]
        limit = min((p.deadline - time.monotonic() for p in busy), default=POLL_S)
        wait([*(p.pipe for p in busy), self._woken], max(0.0, min(limit, POLL_S)) if busy else None)
        with suppress(BlockingIOError):
            os.read(self._woken, 1 << 10)

    def _end_wait(self) -> None:
        with suppress(BlockingIOError):  # a full pipe wakes as well
            os.write(self._wake, b"x")

    def _stop(self, reason: BaseException) -> None:
        with self._lock:
            self._stopped = self._stopped or reason
        self._end_wait()

    def _break_off(self) -> None:
        """Fail all open futures with the thread's end."""
        reason = self._stopped
        assert reason is not None
        left = [*self._running.values(), *(future for _, future in self._waiting)]
        self._running.clear()
        self._waiting.clear()
        if not self._ready.done():
            self._ready.set_exception(reason)
        for future in left:
            if not future.done() and (future.running() or future.set_running_or_notify_cancel()):
                future.set_exception(reason)
