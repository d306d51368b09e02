"""Main program of a reward process: runs rules for its parent, one response at a time.

Its output goes to a log of its own. It imports nothing heavy, so that it starts at once.
"""

from __future__ import annotations

import faulthandler
import json
import os
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NoReturn

from roll_r3.errors import ConfigError
from roll_r3.processes import die_with_parent
from roll_r3.rewards.functions import Call
from roll_r3.rewards.rules import Rule, Undecided, as_score

READY, REFUSED, SCORE, UNDECIDED, FAILED = "ready", "refused", "score", "undecided", "failed"
"""Kinds of message, each sent as JSON [number of the task, kind, value].

First [0, READY, [names requested by each rule, ...]] or [0, REFUSED, [text, ...]]; then for each task SCORE with a
number, UNDECIDED with a text, or FAILED with a text."""
LONGEST_TEXT = 500
"""Maximum number of characters of a reported error."""

_Found = tuple[Callable[..., Any], Call]


def main() -> None:
    """Run the process.

    Arguments of the command line: file descriptor of this process's pipe end, process id of the parent.
    """
    pipe_end, parent = map(int, sys.argv[1:3])
    die_with_parent(parent)
    with suppress(OSError):  # where memory runs out, the kernel kills this process before the run's others
        Path("/proc/self/oom_score_adj").write_text("1000")
    faulthandler.enable()
    os.set_inheritable(pipe_end, False)  # programs that a rule starts do not hold it open
    serve(Connection(pipe_end))


def serve(pipe: Connection) -> None:
    """Receive the rules, then (number, index of the rule, requested values) of each task until the pipe closes."""
    process = os.getpid()

    def answer(number: int, kind: str, value: Any) -> None:
        if os.getpid() != process:
            _exit_fork()
        pipe.send_bytes(json.dumps([number, kind, value]).encode())

    rules: list[Rule] = pipe.recv()
    found, problems = _import(rules)
    if problems:
        answer(0, REFUSED, problems)
        return
    answer(0, READY, [call.requested for _, call in found])
    while True:
        try:
            number, index, values = pipe.recv()
        except EOFError:
            return
        function, call = found[index]
        answer(number, *_scored(function, call, values, process))


def _import(rules: Sequence[Rule]) -> tuple[list[_Found], list[str]]:
    """Import every rule's function; returns functions with their calls, and problems."""
    found, problems = [], []
    for rule in rules:
        try:
            function = rule.find()
            found.append((function, rule.call_of(function)))
        except ConfigError as error:
            problems += str(error).splitlines()
        except BaseException as error:  # noqa: BLE001  a user's module may raise anything, SystemExit too
            traceback.print_exc()
            problems.append(f"rewards: an import {_raised(error)}")
    return found, problems


def _scored(
    function: Callable[..., Any], call: Call, values: Mapping[str, Any], process: int
) -> tuple[str, float | str]:
    """Call the function for one response.

    Args:
        process: id of this process; a fork made by the function exits here.
    """
    try:
        value = call(function, values)
    except Undecided as error:
        return UNDECIDED, _text(error)
    except BaseException as error:  # noqa: BLE001  sys.exit() in a rule is its failure, not this process's end
        traceback.print_exc()
        if os.getpid() != process:
            _exit_fork(error)
        return FAILED, _raised(error)
    try:
        return SCORE, as_score(value)
    except Exception as error:  # noqa: BLE001  __float__ is the user's as well
        return FAILED, _text(error) if isinstance(error, ValueError) else _raised(error)


def _exit_fork(error: BaseException | None = None) -> NoReturn:
    """Exit a fork of this process that returned from the rule: the pipe belongs to the parent.

    Args:
        error: error raised by the rule; it decides the exit status as in any Python program.
    """
    status: Any = 0
    if error is not None:
        status = error.code if isinstance(error, SystemExit) else 1
        if status is not None and not isinstance(status, int):
            status = 1
    with suppress(Exception):  # `_exit` does not
        sys.stdout.flush()
    os._exit(status or 0)


def _raised(error: BaseException) -> str:
    return f"raised {type(error).__name__}: {_text(error)}"


def _text(error: BaseException) -> str:
    try:
        return str(error)[:LONGEST_TEXT]
    except Exception:  # noqa: BLE001  __str__ is the user's as well
        return "(its text is not available)"
