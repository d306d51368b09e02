"""A process that runs reward rules, one response at a time, as the one that started it says.

What it prints goes where its output goes: a log of its own. Imports nothing heavy, so that it starts at once.
"""

from __future__ import annotations

import faulthandler
import os
import sys
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

from roll_r3.errors import ConfigError
from roll_r3.processes import die_with_parent
from roll_r3.rewards.rules import Rule, as_score

READY, REFUSED, SCORE, FAILED = "ready", "refused", "score", "failed"
"""Kinds of answer: (READY, None) or (REFUSED, text) once, then (SCORE, float) or (FAILED, text) for each response."""
LONGEST_TEXT = 500
"""Characters of an error that are told."""


def main() -> None:
    """Arguments: the end of a pipe that is this process's own, and the process that started it."""
    pipe_end, parent = map(int, sys.argv[1:3])
    die_with_parent(parent)
    faulthandler.enable()
    os.set_inheritable(pipe_end, False)  # programs that a rule starts do not hold it open
    serve(Connection(pipe_end))


def serve(pipe: Connection) -> None:
    """Take rules, then (index of a rule, response, ground truth) after another, until the pipe closes."""
    rules: list[Rule] = pipe.recv()
    functions = []
    try:
        functions = [rule.find() for rule in rules]
    except ConfigError as error:
        pipe.send((REFUSED, str(error)))
        return
    except BaseException as error:  # noqa: BLE001  a user's module may raise anything, SystemExit too
        traceback.print_exc()
        pipe.send((REFUSED, f"rewards: an import {_told(error)}"))
        return
    pipe.send((READY, None))
    while True:
        try:
            index, response, ground_truth = pipe.recv()
        except EOFError:
            return
        pipe.send(_answer(functions[index], rules[index], response, ground_truth))


def _answer(function: Callable[..., Any], rule: Rule, response: str, ground_truth: str) -> tuple[str, float | str]:
    try:
        value = function(response, ground_truth, **rule.kwargs)
    except BaseException as error:  # noqa: BLE001  sys.exit() in a rule is its failure, not this process's end
        traceback.print_exc()
        return FAILED, _told(error)
    try:
        return SCORE, as_score(value)
    except Exception as error:  # noqa: BLE001  __float__ is the user's as well
        return FAILED, str(error) if isinstance(error, ValueError) else _told(error)


def _told(error: BaseException) -> str:
    try:
        text = str(error)
    except Exception:  # noqa: BLE001  __str__ is the user's as well
        text = "(its text cannot be had)"
    return f"raised {type(error).__name__}: {text[:LONGEST_TEXT]}"
