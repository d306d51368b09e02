"""The processes that run reward rules: whose turn it is, and what came back.

A user's rule may do anything: loop for ever, crash its interpreter, start programs. So it runs in a process that can be
killed, with the process group that it started, and replaced. Each process has one response at a time, which is what
makes the time limit that of a response, and bounds what is under way.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Sequence
from multiprocessing.connection import wait
from pathlib import Path

from roll_r3.errors import RollError
from roll_r3.rewards.process import POLL_S, Answer, Failure, Process, Task
from roll_r3.rewards.rules import Rule


class RewardProcesses:
    """A fixed number of processes. The thread that uses it should live as long: the kernel kills its children."""

    def __init__(self, rules: Sequence[Rule], size: int, log_dir: Path) -> None:
        """Nothing is started yet."""
        first_calls: dict[int, float] = {}
        self._processes = [
            Process(number, list(rules), log_dir / f"rewards-{number}.log", first_calls) for number in range(size)
        ]

    def start(self) -> None:
        """Start the processes, without waiting for them."""
        for process in self._processes:
            process.start()

    def close(self) -> None:
        """Kill them, with the process groups that they started."""
        for process in self._processes:
            process.kill()

    def wait_until_ready(self) -> None:
        """Until every process has imported every rule.

        Raises:
            ConfigError: one could not, or a rule cannot be called with its kwargs and what is offered.
        """
        while starting := [process for process in self._processes if not process.ready]:
            self._wait(starting)
            for process in starting:
                process.look()

    def score(self, tasks: Sequence[Task], max_failures: int) -> list[Answer]:
        """The answer to every task, in their order; it ends early when more than `max_failures` have no score.

        A rule that raises, takes longer than its `timeout`, kills its process, or returns what is no finite number
        gives a `Failure`; a judge gives `Undecided` in the place of most of these.

        Raises:
            RollError: a process that had to be replaced could not import the rules again.
            TooManyFailuresError: what it says.
        """
        try:
            return self._score(tasks, max_failures)
        except BaseException:  # a signal's too: whoever comes next must not get this one's answers
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
                index, answer = process.task, process.look()
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
        """Until one of them has something to say, or a time limit or a look at their lives is due."""
        now = time.monotonic()
        limit = min((process.deadline - now for process in processes), default=0.0)
        wait([process.pipe for process in processes], max(0.0, min(limit, POLL_S)))


class TooManyFailuresError(RollError):
    """`score` ended early."""

    def __init__(self, failures: dict[int, Failure]) -> None:
        """
        Args:
            failures: by the index of their task.
        """
        super().__init__(f"{len(failures)} responses have no reward")
        self.failures = failures
