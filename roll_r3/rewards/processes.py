"""The processes that run reward rules, as the one that started them sees them.

A user's rule may do anything: loop for ever, crash its interpreter, start programs. So it runs in a process that can be
killed, with everything that it started, and replaced. Each process has one response at a time, which is what makes the
time limit that of a response, and bounds what is under way.
"""

from __future__ import annotations

import logging
import math
import os
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing import Pipe
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

from roll_r3.errors import ConfigError, RollError
from roll_r3.rewards.rules import Rule
from roll_r3.rewards.worker import READY, SCORE

logger = logging.getLogger(__name__)

START_TIMEOUT = 300.0
"""Seconds for a process to start and to import the rules; they may lie on a slow disk, and import much."""
_POLL_S = 1.0
"""How often a process is asked whether it lives: a child of its own may hold the pipe open after its death."""
_KILL_TIMEOUT = 10.0
_PROGRAM = "import sys; sys.path[:] = sys.argv[3:]; from roll_r3.rewards.worker import main; main()"


@dataclass(frozen=True)
class Task:
    """One response to be scored."""

    rule: int
    """Which of the rules."""
    response: str
    ground_truth: str


@dataclass(frozen=True)
class Failure:
    """A response has no score."""

    reason: str
    """What the rule did: "raised ValueError: ..."."""


class RewardProcesses:
    """A fixed number of processes. The thread that uses it should live as long: the kernel kills its children."""

    def __init__(self, rules: Sequence[Rule], size: int, log_dir: Path) -> None:
        """Nothing is started yet."""
        self._rules = list(rules)
        self._processes = [_Process(number, self._rules, log_dir / f"rewards-{number}.log") for number in range(size)]

    def start(self) -> None:
        """Start the processes, without waiting for them."""
        for process in self._processes:
            process.start()

    def close(self) -> None:
        """Kill them, with everything that they started."""
        for process in self._processes:
            process.kill()

    def wait_until_ready(self) -> None:
        """Until every process has imported every rule.

        Raises:
            ConfigError: one could not.
        """
        while starting := [process for process in self._processes if not process.ready]:
            self._wait(starting)
            for process in starting:
                process.look()

    def score(self, tasks: Sequence[Task], max_failures: int) -> list[float | Failure]:
        """The score of every task, in their order; it ends early when more than `max_failures` have none.

        A rule that raises, takes longer than its `timeout`, kills its process, or returns what is no finite number
        gives a `Failure`.

        Raises:
            ConfigError: a process that had to be replaced could not import the rules again.
            TooManyFailuresError: what it says.
        """
        try:
            return self._score(tasks, max_failures)
        except BaseException:  # a signal's too: whoever comes next must not get this one's answers
            for process in self._processes:
                if process.task is not None:
                    process.restart()
            raise

    def _score(self, tasks: Sequence[Task], max_failures: int) -> list[float | Failure]:
        answers: list[float | Failure | None] = [None] * len(tasks)
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

    def _wait(self, processes: Sequence[_Process]) -> None:
        """Until one of them has something to say, or a time limit or a look at their lives is due."""
        now = time.monotonic()
        limit = min((process.deadline - now for process in processes), default=0.0)
        wait([process.pipe for process in processes], max(0.0, min(limit, _POLL_S)))


class TooManyFailuresError(RollError):
    """`score` ended early."""

    def __init__(self, failures: dict[int, Failure]) -> None:
        """
        Args:
            failures: by the index of their task.
        """
        super().__init__(f"{len(failures)} responses have no reward")
        self.failures = failures


class _Process:
    """One of them; replaced in place when it dies."""

    def __init__(self, number: int, rules: Sequence[Rule], log: Path) -> None:
        self._number = number
        self._rules = rules
        self._log = log
        self._process: subprocess.Popen[bytes] | None = None
        self.pipe: Any = None
        self.ready = False
        """It has imported the rules."""
        self.task: int | None = None
        """Index of the task that it works on."""
        self._limit = 0.0
        self.deadline = 0.0
        """When it is to have answered, on the monotonic clock."""

    def start(self) -> None:
        self.pipe, theirs = Pipe()
        command = [sys.executable, "-c", _PROGRAM, str(theirs.fileno()), str(os.getpid()), *sys.path]
        with self._log.open("ab") as log, theirs:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                pass_fds=(theirs.fileno(),),
                start_new_session=True,  # so that what it starts can be killed with it
            )
        self.ready, self.task = False, None
        self._expect(START_TIMEOUT)
        with suppress(BrokenPipeError):  # `look` says what became of it
            self.pipe.send(self._rules)

    def kill(self) -> None:
        """End it and everything that it started; safe to call twice."""
        if self._process is None:
            return
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        try:
            self._process.wait(_KILL_TIMEOUT)
        except subprocess.TimeoutExpired:  # a disk that does not answer may hold it; the run need not wait
            logger.warning("%s, process %d, does not end", self._name, self._process.pid)
        self._process = None
        self.pipe.close()

    def restart(self) -> None:
        self.kill()
        self.start()

    def give(self, index: int, task: Task) -> bool:
        """Have it score a response; False: it died in idleness, and another takes its place."""
        assert self._process is not None
        self.task = index  # before it has any: see `RewardProcesses.score`
        try:
            if self._process.poll() is not None:
                raise BrokenPipeError
            self.pipe.send((task.rule, task.response, task.ground_truth))
        except BrokenPipeError:
            logger.warning("%s %s between two responses; another takes its place", self._name, self._ended())
            self.restart()
            return False
        self._expect(self._rules[task.rule].timeout)
        return True

    def look(self) -> float | Failure | None:
        """What it answered to its task, if it did; one that is dead or late is replaced.

        Raises:
            ConfigError: it could not import the rules.
        """
        assert self._process is not None
        if self.ready and self.task is None:
            return None  # `give` looks after those
        ended = self._process.poll() is not None  # before the pipe: what it said at last is still heard
        message: tuple[str, Any] | None = None
        if self.pipe.poll():
            with suppress(EOFError, OSError):
                message = self.pipe.recv()
            ended = ended or message is None
        if message is not None:
            return self._take(*message)
        if ended:
            reason = self._ended()
        elif time.monotonic() > self.deadline:
            reason = f"did not return within {self._limit:g} s"
        else:
            return None
        if not self.ready:
            raise ConfigError(f"rewards: {self._name} {reason} while it imported the rules; see {self._log}")
        self.restart()
        return Failure(reason)

    def _take(self, kind: str, value: Any) -> float | Failure | None:
        if self.ready:
            self.task = None
            return float(value) if kind == SCORE else Failure(value)
        if kind != READY:
            raise ConfigError(value)
        self.ready, self.deadline = True, math.inf
        return None

    def _expect(self, limit: float) -> None:
        self._limit, self.deadline = limit, time.monotonic() + limit

    @property
    def _name(self) -> str:
        return f"reward process {self._number}"

    def _ended(self) -> str:
        """In words."""
        assert self._process is not None
        with suppress(subprocess.TimeoutExpired):  # its end of the pipe may close a moment before it is gone
            self._process.wait(_POLL_S)
        code = self._process.returncode
        if code is None:
            return "closed its pipe"
        return (
            f"killed its process ({signal.Signals(-code).name})"
            if code < 0
            else f"ended its process (exit code {code})"
        )
