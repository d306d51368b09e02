"""A process that runs reward rules, one response at a time, as the one that started it says.

What it prints goes where its output goes: a log of its own. Imports nothing heavy, so that it starts at once.
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
from roll_r3.rewards.calls import Call
from roll_r3.rewards.rules import Rule, Undecided, as_score

READY, REFUSED, SCORE, UNDECIDED, FAILED = "ready", "refused", "score", "undecided", "failed"
"""Kinds of answer, each sent as JSON [number of the task, kind, value].

First [0, READY, [names that each rule asks for, ...]] or [0, REFUSED, [text, ...]]; then for each task SCORE with a
number, UNDECIDED with a text, or FAILED with a text."""
LONGEST_TEXT = 500
"""Characters of an error that are told."""

_Found = tuple[Callable[..., Any], Call]


def main() -> None:
    """Arguments: the end of a pipe that is this process's own, and the process that started it."""
    pipe_end, parent = map(int, sys.argv[1:3])
    die_with_parent(parent)
    with suppress(OSError):  # where memory runs out, the kernel kills this process before the run's others
        Path("/proc/self/oom_score_adj").write_text("1000")
    faulthandler.enable()
    os.set_inheritable(pipe_end, False)  # programs that a rule starts do not hold it open
    serve(Connection(pipe_end))


def serve(pipe: Connection) -> None:
    """Take rules, then (number, index of a rule, values that it asked for) after another, until the pipe closes."""
    process = os.getpid()

    def answer(number: int, kind: str, value: Any) -> None:
        if os.getpid() != process:
            _leave_copy()
        pipe.send_bytes(json.dumps([number, kind, value]).encode())

    rules: list[Rule] = pipe.recv()
    found, problems = _import(rules)
    if problems:
        answer(0, REFUSED, problems)
        return
    answer(0, READY, [call.asked for _, call in found])
    while True:
        try:
            number, index, values = pipe.recv()
        except EOFError:
            return
        function, call = found[index]
        answer(number, *_scored(function, call, values, process))


def _import(rules: Sequence[Rule]) -> tuple[list[_Found], list[str]]:
    """Every rule's function and its call; what is wrong with any of them."""
    found, problems = [], []
    for rule in rules:
        try:
            function = rule.find()
            found.append((function, rule.call_of(function)))
        except ConfigError as error:
            problems += str(error).splitlines()
        except BaseException as error:  # noqa: BLE001  a user's module may raise anything, SystemExit too
            traceback.print_exc()
            problems.append(f"rewards: an import {_told(error)}")
    return found, problems


def _scored(
    function: Callable[..., Any], call: Call, values: Mapping[str, Any], process: int
) -> tuple[str, float | str]:
    """
    Args:
        process: this one; a copy of it that the function made ends here.
    """
    try:
        value = call(function, values)
    except Undecided as error:
        return UNDECIDED, _text(error)
    except BaseException as error:  # noqa: BLE001  sys.exit() in a rule is its failure, not this process's end
        traceback.print_exc()
        if os.getpid() != process:
            _leave_copy(error)
        return FAILED, _told(error)
    try:
        return SCORE, as_score(value)
    except Exception as error:  # noqa: BLE001  __float__ is the user's as well
        return FAILED, _text(error) if isinstance(error, ValueError) else _told(error)


def _leave_copy(error: BaseException | None = None) -> NoReturn:
    """End a copy of this process that a rule made by fork and that came back from the rule: the pipe is not its own.

    Args:
        error: what the rule raised in it, which decides its exit status as in any Python program.
    """
    status: Any = 0
    if error is not None:
        status = error.code if isinstance(error, SystemExit) else 1
        if status is not None and not isinstance(status, int):
            status = 1
    with suppress(Exception):  # `_exit` does not
        sys.stdout.flush()
    os._exit(status or 0)


def _told(error: BaseException) -> str:
    return f"raised {type(error).__name__}: {_text(error)}"


def _text(error: BaseException) -> str:
    try:
        return str(error)[:LONGEST_TEXT]
    except Exception:  # noqa: BLE001  __str__ is the user's as well
        return "(its text cannot be had)"
