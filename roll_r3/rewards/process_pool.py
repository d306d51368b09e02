"""Pool of processes for reward rules.

A user's rule may loop forever, crash its interpreter or start programs. So it runs in a process that can be killed with
its process group, and restarted. A process handles one response at a time, so that the time limit is per response.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Sequence
from multiprocessing.connection import wait
from pathlib import Path

from roll_r3.errors import RollError
from roll_r3.rewards.reward_process import POLL_S, Answer, Failure, Process, Task
from roll_r3.rewards.rules import Rule


class RewardProcesses:
    """Fixed number of processes. Their starting thread must outlive them: the kernel kills its children with it."""

    def __init__(self, rules: Sequence[Rule], size: int, log_dir: Path) -> None:
        """Prepare the processes without starting them."""
        first_calls: dict[int, float] = {}
        self._processes = [
            Process(number, list(rules), log_dir / f"rewards-{number}.log", first_calls) for number in range(size)
        ]

    def start(self) -> None:
        """Start the processes, without waiting for them."""
        for process in self._processes:
            process.start()

    def close(self) -> None:
        """Kill the processes with their process groups."""
        for process in self._processes:
            process.kill()

    def wait_until_ready(self) -> None:
        """Wait until every process has imported every rule.

        Raises:
            ConfigError: an import failed, or a rule cannot be called with its kwargs and the offered values.
        """
        while starting := [process for process in self._processes if not process.ready]:
            self._wait(starting)
            for process in starting:
                process.poll()

    def score(self, tasks: Sequence[Task], max_failures: int) -> list[Answer]:
        """Return the answers to all tasks, in their order.

        A rule gives a `Failure` if it raises, exceeds its `timeout`, kills its process or returns no finite number.
        A judge gives `Undecided` for most of these.

        Raises:
            RollError: a restarted process could not import the rules again.
            TooManyFailuresError: more than `max_failures` responses have no score; raised early.
        """
        try:
            return self._score(tasks, max_failures)
        except BaseException:  # including signals: the next call must not receive answers of this one
            for process in self._processes:
                if process.task is not None:
                    process.restart()
            raise

    def _score(self, tasks: Sequence[Task], max_failures: int) -> list[Answer]:
        answers: list[Answer | None] = [None] * len(tasks)
        waiting = deque(range(len(tasks)))
        failures: dict[int, Failure] = {}
        while waiting or any(process.task is not None for process in self._processes):
            for process in self._processes:
                if waiting and process.ready and process.task is None and process.give(waiting[0], tasks[waiting[0]]):
                    waiting.popleft()
            self._wait([p for p in self._processes if p.task is not None or (waiting and not p.ready)])
            for process in self._processes:
                index, answer = process.task, process.poll()
                if answer is None:
                    continue
                assert index is not None
                answers[index] = answer
                if isinstance(answer, Failure):
                    failures[index] = answer
                    if len(failures) > max_failures:
                        raise TooManyFailuresError(failures)
        return [answer for answer in answers if answer is not None]

    def _wait(self, processes: Sequence[Process]) -> None:
        """Wait for a message, the next deadline, or the next poll."""
        now = time.monotonic()
        limit = min((process.deadline - now for process in processes), default=0.0)
        wait([process.pipe for process in processes], max(0.0, min(limit, POLL_S)))


class TooManyFailuresError(RollError):
    """Error: too many responses without a score."""

    def __init__(self, failures: dict[int, Failure]) -> None:
        """
        Args:
            failures: index of the task -> failure.
        """
        super().__init__(f"{len(failures)} responses have no reward")
        self.failures = failures
