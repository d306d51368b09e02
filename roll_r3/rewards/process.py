"""A process that runs reward rules, as the one that started it sees it; replaced in place when it dies."""

from __future__ import annotations

import json
import logging
import math
import os
import signal
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing import Pipe
from pathlib import Path
from typing import Any

from roll_r3.config.readable import printable, readable
from roll_r3.errors import ConfigError, RollError
from roll_r3.rewards.calls import Response
from roll_r3.rewards.rules import Rule
from roll_r3.rewards.worker import FAILED, READY, REFUSED, SCORE, UNDECIDED

logger = logging.getLogger(__name__)

START_TIMEOUT = 300.0
"""Seconds for a process to start and to import the rules; they may lie on a slow disk, and import much."""
_MOST_STARTS = 3
"""Starts in a row of a process that imported the rules before and now dies at it."""
POLL_S = 1.0
"""Interval of looks at a process: a child of its own may hold the pipe open after its death."""
_KILL_TIMEOUT = 10.0
_PIPE_TIMEOUT_S = 10
"""Seconds for a process to take what it is sent, and for the rest of a message that it began."""
_MOST_ANSWER = 1 << 20
"""Bytes of an answer."""
LOG_BYTES = 16 << 20
"""A log that grows past this loses its older half."""
_PROGRAM = "import sys; sys.path[:] = sys.argv[3:]; from roll_r3.rewards.worker import main; main()"


@dataclass(frozen=True)
class Task:
    """One response to be scored."""

    rule: int
    """Index of the rule."""
    response: Response


@dataclass(frozen=True)
class Failure:
    """A response has no score."""

    reason: str
    """Reason of the failure: "raised ValueError: ..."."""


@dataclass(frozen=True)
class Undecided:
    """A judge gave up on a response: its score is 0."""

    reason: str


Answer = float | Failure | Undecided


class Process:
    """One process. Its answers carry the number of their task, so that no other's is taken for it."""

    def __init__(self, number: int, rules: Sequence[Rule], log: Path, first_calls: dict[int, float]) -> None:
        """
        Args:
            first_calls: rule -> seconds of the longest first call in a process so far; shared by all processes.
        """
        self._number = number
        self._rules = rules
        self._log = log
        self._first_calls = first_calls
        self._process: subprocess.Popen[bytes] | None = None
        self.pipe: Any = None
        self.ready = False
        """It has imported the rules."""
        self.task: int | None = None
        """Index of the task that it works on."""
        self._rule = 0
        """The rule of that task."""
        self._asked: list[list[str]] = []
        """Values that each rule asks for."""
        self._called: set[int] = set()
        """Rules that returned here once: they have imported what they need."""
        self._tasks = 0
        """Tasks given so far, by this process and those that it replaces: the number of the last one."""
        self._imported = False
        """It, or one that it replaces, was ready once."""
        self._failed_starts = 0
        """In a row."""
        self._began = 0.0
        """Time of its start or of its task, on the monotonic clock."""

    def start(self) -> None:
        self.pipe, theirs = Pipe()
        _bound_waits(self.pipe.fileno())
        command = [sys.executable, "-c", _PROGRAM, str(theirs.fileno()), str(os.getpid()), *sys.path]
        with self._log.open("ab") as log, theirs:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                pass_fds=(theirs.fileno(),),
                env=environment(os.environ),
                start_new_session=True,  # so that what it starts can be killed with it
            )
        self.ready, self.task = False, None
        self._called = set()
        self._began = time.monotonic()
        with suppress(OSError):  # `look` says what became of it
            self.pipe.send(self._rules)

    def kill(self) -> None:
        """End it and what it started, except what has left its process group; safe to call twice."""
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

    @property
    def deadline(self) -> float:
        """Latest time of its answer, on the monotonic clock."""
        return math.inf if self.ready and self.task is None else self._began + self._limit

    @property
    def _limit(self) -> float:
        """Seconds for what it does now. A rule may import more in its first call in a process."""
        if not self.ready:
            return START_TIMEOUT
        rule = self._rules[self._rule]
        if rule.judge or self._rule in self._called:
            return rule.timeout
        longest = self._first_calls.get(self._rule)
        return rule.timeout + (START_TIMEOUT if longest is None else 2 * longest)

    def give(self, index: int, task: Task) -> bool:
        """Have it score a response; False: it died in idleness, and another takes its place."""
        assert self._process is not None
        self.task, self._rule = index, task.rule  # before it has any: see `RewardProcesses.score`
        self._tasks += 1
        try:
            if self._process.poll() is not None:
                raise BrokenPipeError
            self.pipe.send((self._tasks, task.rule, task.response.values(self._asked[task.rule])))
        except OSError as error:
            late = isinstance(error, BlockingIOError)
            reason = f"did not take a response within {_PIPE_TIMEOUT_S} s" if late else self._ended()
            logger.warning("%s %s between two responses; another takes its place", self._name, reason)
            self.restart()
            return False
        self._began = time.monotonic()
        return True

    def look(self) -> Answer | None:
        """Answer to its task, if there is one; a dead or late process is replaced.

        Raises:
            ConfigError: it could not import the rules.
            RollError: it could before, and now does not although it was replaced.
        """
        assert self._process is not None
        self._bound_log()
        if self.ready and self.task is None:
            return None  # `give` looks after those
        ended = self._process.poll() is not None  # before the pipe: what it said at last is still heard
        message: list[Any] | None = None
        if self.pipe.poll():
            message = self._received()
            ended = ended or message is None
        if message is not None:
            return self._take(*message)
        if ended:
            reason = self._ended()
        elif time.monotonic() > self.deadline:
            reason = f"did not return within {round(self._limit, 1):g} s"
        else:
            return None
        if not self.ready:
            self._start_failed([f"rewards: {self._name} {reason} while it imported the rules; see {self._log}"])
            return None
        judge = self._rules[self._rule].judge
        self.restart()
        return Undecided(reason) if judge else Failure(reason)

    def _received(self) -> list[Any] | None:
        """Its message; None: the pipe is closed, or holds something else."""
        try:
            message = json.loads(self.pipe.recv_bytes(_MOST_ANSWER))
        except (EOFError, OSError, ValueError, RecursionError):
            return None
        return message if isinstance(message, list) and len(message) == 3 else None

    def _take(self, number: int, kind: str, value: Any) -> Answer | None:
        if not self.ready:
            if kind != READY:
                self._start_failed([printable(str(text)) for text in value] if kind == REFUSED else [readable(value)])
                return None
            self.ready, self._imported, self._failed_starts, self._asked = True, True, 0, value
            return None
        if number != self._tasks or kind not in (SCORE, UNDECIDED, FAILED):
            logger.warning("%s sent an answer to no question: %s", self._name, readable([number, kind, value]))
            return None
        if self._rule not in self._called:
            self._called.add(self._rule)
            seconds = time.monotonic() - self._began
            self._first_calls[self._rule] = max(seconds, self._first_calls.get(self._rule, 0.0))
        self.task = None
        if kind == SCORE:
            return float(value)
        reason = printable(str(value))
        return Undecided(reason) if kind == UNDECIDED else Failure(reason)

    def _start_failed(self, reasons: Sequence[str]) -> None:
        """Start it again, if it imported the rules before: then the rules are not what is wrong.

        Raises:
            ConfigError: it never imported them.
            RollError: that happened too often in a row.
        """
        text = "\n".join(reasons)
        if not self._imported:
            raise ConfigError(text)
        self._failed_starts += 1
        if self._failed_starts >= _MOST_STARTS:
            raise RollError(f"{text}\nthe same process imported them before; {_MOST_STARTS} starts in a row failed")
        logger.warning("%s; another takes its place", text)
        self.restart()

    @property
    def _name(self) -> str:
        return f"reward process {self._number}"

    def _ended(self) -> str:
        """In words."""
        assert self._process is not None
        with suppress(subprocess.TimeoutExpired):  # its end of the pipe may close a moment before it is gone
            self._process.wait(POLL_S)
        code = self._process.returncode
        if code is None:
            return "closed its pipe, or wrote something else to it"
        if code >= 0:
            return f"ended its process (exit code {code})"
        name = signal.Signals(-code).name
        hint = ": the kernel does that where memory runs out" if name == "SIGKILL" else ""
        return f"killed its process ({name}{hint})"

    def _bound_log(self) -> None:
        """Keep the newer half of a log that has grown too large. What is printed meanwhile may land before it."""
        with suppress(OSError):
            if self._log.stat().st_size <= LOG_BYTES:
                return
            with self._log.open("r+b") as log:
                log.seek(-LOG_BYTES // 2, os.SEEK_END)
                kept = log.read(LOG_BYTES // 2)
                log.truncate(0)
            with self._log.open("ab") as log:
                log.write(b"[what was printed before was cut off]\n" + kept)


def environment(ours: Mapping[str, str]) -> dict[str, str]:
    """A reward process's environment: this one's without what belongs to Ray, whose token opens the cluster."""
    return {name: value for name, value in ours.items() if not name.startswith("RAY_")}


def _bound_waits(pipe: int) -> None:
    """Have the kernel bound the time that a read or write of a pipe's end may block."""
    limit = struct.pack("ll", _PIPE_TIMEOUT_S, 0)
    with socket.socket(fileno=os.dup(pipe)) as end:
        end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, limit)
        end.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, limit)
