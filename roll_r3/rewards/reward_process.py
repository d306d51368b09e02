"""Parent's side of a process for reward rules; a process that dies is restarted."""

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

from roll_r3.config.findings.readable import printable, readable
from roll_r3.errors import ConfigError, RollError
from roll_r3.rewards.functions import Response
from roll_r3.rewards.rules import Rule
from roll_r3.rewards.worker import FAILED, READY, REFUSED, SCORE, UNDECIDED

logger = logging.getLogger(__name__)

START_TIMEOUT = 300.0
"""Seconds for a process to start and import the rules, possibly large modules on a slow disk."""
_MAX_FAILED_STARTS = 3
"""Maximum number of consecutive failed starts of a process that imported the rules before."""
POLL_S = 1.0
"""Interval of polling a process, as its own child may hold the pipe open after its death."""
_KILL_TIMEOUT = 10.0
_PIPE_TIMEOUT_S = 10
"""Seconds for a process to accept a message, and to finish a message it began to send."""
_MAX_MESSAGE = 1 << 20
"""Maximum size of a message from a process, bytes."""
LOG_BYTES = 16 << 20
"""Size limit of a log; a longer one loses its older half."""
_PROGRAM = "import sys; sys.path[:] = sys.argv[3:]; from roll_r3.rewards.worker import main; main()"


@dataclass(frozen=True)
class Task:
    """Response to score, with its rule."""

    rule: int
    """Index of the rule."""
    response: Response


@dataclass(frozen=True)
class Failure:
    """Answer for a response without a score."""

    reason: str
    """Reason such as "raised ValueError: ..."."""


@dataclass(frozen=True)
class Undecided:
    """Answer of a judge that could not decide: the score is 0."""

    reason: str


Answer = float | Failure | Undecided


class Process:
    """One process. Answers carry the number of their task, so that late answers of earlier tasks are recognised."""

    def __init__(self, number: int, rules: Sequence[Rule], log: Path, first_calls: dict[int, float]) -> None:
        """
        Args:
            first_calls: rule -> longest first call in any process so far, seconds; shared by all processes.
        """
        self._number = number
        self._rules = rules
        self._log = log
        self._first_calls = first_calls
        self._process: subprocess.Popen[bytes] | None = None
        self.pipe: Any = None
        self.ready = False
        """True once the rules are imported."""
        self.task: int | None = None
        """Index of the current task."""
        self._rule = 0
        """Rule of the current task."""
        self._requested: list[list[str]] = []
        """Names of the values requested by each rule."""
        self._called: set[int] = set()
        """Rules that returned once in this process, so that their imports are done."""
        self._tasks = 0
        """Number of tasks given so far, earlier processes included: the number of the last task."""
        self._imported = False
        """True if this process, or an earlier one, was ready once."""
        self._failed_starts = 0
        """Number of consecutive failed starts."""
        self._began = 0.0
        """Time of the start or of the current task, on the monotonic clock."""

    def start(self) -> None:
        self.pipe, theirs = Pipe()
        _set_timeouts(self.pipe.fileno())
        command = [sys.executable, "-c", _PROGRAM, str(theirs.fileno()), str(os.getpid()), *sys.path]
        with self._log.open("ab") as log, theirs:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                pass_fds=(theirs.fileno(),),
                env=environment(os.environ),
                start_new_session=True,  # so that its children can be killed with it
            )
        self.ready, self.task = False, None
        self._called = set()
        self._began = time.monotonic()
        with suppress(OSError):  # `poll` reports a dead process
            self.pipe.send(self._rules)

    def kill(self) -> None:
        """Kill the process group; safe to call twice. Children that left the group survive."""
        if self._process is None:
            return
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        try:
            self._process.wait(_KILL_TIMEOUT)
        except subprocess.TimeoutExpired:  # a disk without an answer may hold it; the run need not wait
            logger.warning("%s (pid %d) does not exit", self._name, self._process.pid)
        self._process = None
        self.pipe.close()

    def restart(self) -> None:
        self.kill()
        self.start()

    @property
    def deadline(self) -> float:
        """Deadline of the answer, on the monotonic clock."""
        return math.inf if self.ready and self.task is None else self._began + self._limit

    @property
    def _limit(self) -> float:
        """Seconds for the current work. The first call of a rule in a process may import more."""
        if not self.ready:
            return START_TIMEOUT
        rule = self._rules[self._rule]
        if rule.judge or self._rule in self._called:
            return rule.timeout
        longest = self._first_calls.get(self._rule)
        return rule.timeout + (START_TIMEOUT if longest is None else 2 * longest)

    def give(self, index: int, task: Task) -> bool:
        """Send a response to score. Returns False if the process had died while idle; it is restarted."""
        assert self._process is not None
        self.task, self._rule = index, task.rule  # before it is sent: see `RewardProcesses.score`
        self._tasks += 1
        try:
            if self._process.poll() is not None:
                raise BrokenPipeError
            self.pipe.send((self._tasks, task.rule, task.response.values(self._requested[task.rule])))
        except OSError as error:
            late = isinstance(error, BlockingIOError)
            reason = f"did not accept a response within {_PIPE_TIMEOUT_S} s" if late else self._ended()
            logger.warning("%s %s between two responses; restarting it", self._name, reason)
            self.restart()
            return False
        self._began = time.monotonic()
        return True

    def poll(self) -> Answer | None:
        """Return the answer to the current task, if there is one; restart a dead or late process.

        Raises:
            ConfigError: the rules could not be imported.
            RollError: the rules could be imported before, but several starts in a row failed.
        """
        assert self._process is not None
        self._trim_log()
        if self.ready and self.task is None:
            return None  # `give` checks idle processes
        ended = self._process.poll() is not None  # before the pipe, so that its last message is still read
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
            self._start_failed([f"rewards: {self._name} {reason} while importing the rules; see {self._log}"])
            return None
        judge = self._rules[self._rule].judge
        self.restart()
        return Undecided(reason) if judge else Failure(reason)

    def _received(self) -> list[Any] | None:
        """Read a message; None: the pipe is closed, or holds something else."""
        try:
            message = json.loads(self.pipe.recv_bytes(_MAX_MESSAGE))
        except (EOFError, OSError, ValueError, RecursionError):
            return None
        return message if isinstance(message, list) and len(message) == 3 else None

    def _take(self, number: int, kind: str, value: Any) -> Answer | None:
        if not self.ready:
            if kind != READY:
                self._start_failed([printable(str(text)) for text in value] if kind == REFUSED else [readable(value)])
                return None
            self.ready, self._imported, self._failed_starts, self._requested = True, True, 0, value
            return None
        if number != self._tasks or kind not in (SCORE, UNDECIDED, FAILED):
            logger.warning("%s sent an unexpected message: %s", self._name, readable([number, kind, value]))
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
        """Restart if the rules were imported before, since then the rules are not the cause.

        Raises:
            ConfigError: the rules were never imported.
            RollError: too many failed starts in a row.
        """
        text = "\n".join(reasons)
        if not self._imported:
            raise ConfigError(text)
        self._failed_starts += 1
        if self._failed_starts >= _MAX_FAILED_STARTS:
            raise RollError(
                f"{text}\nThe process imported the rules before, but {_MAX_FAILED_STARTS} starts in a row failed"
            )
        logger.warning("%s; restarting it", text)
        self.restart()

    @property
    def _name(self) -> str:
        return f"reward process {self._number}"

    def _ended(self) -> str:
        """Describe the end of the process."""
        assert self._process is not None
        with suppress(subprocess.TimeoutExpired):  # its end of the pipe may close a moment before it is gone
            self._process.wait(POLL_S)
        code = self._process.returncode
        if code is None:
            return "closed its pipe, or wrote invalid data to it"
        if code >= 0:
            return f"ended its process (exit code {code})"
        name = signal.Signals(-code).name
        hint = ": the kernel does this when memory runs out" if name == "SIGKILL" else ""
        return f"killed its process ({name}{hint})"

    def _trim_log(self) -> None:
        """Keep the newer half of a log that is too large. Lines printed meanwhile may land before it."""
        with suppress(OSError):
            if self._log.stat().st_size <= LOG_BYTES:
                return
            with self._log.open("r+b") as log:
                log.seek(-LOG_BYTES // 2, os.SEEK_END)
                kept = log.read(LOG_BYTES // 2)
                log.truncate(0)
            with self._log.open("ab") as log:
                log.write(b"[earlier output was removed]\n" + kept)


def environment(ours: Mapping[str, str]) -> dict[str, str]:
    """Return the environment for a reward process: without Ray's variables, whose token opens the cluster."""
    return {name: value for name, value in ours.items() if not name.startswith("RAY_")}


def _set_timeouts(pipe: int) -> None:
    """Set the kernel's timeouts for reads and writes of a pipe end."""
    limit = struct.pack("ll", _PIPE_TIMEOUT_S, 0)
    with socket.socket(fileno=os.dup(pipe)) as end:
        end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, limit)
        end.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, limit)
