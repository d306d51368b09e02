"""Built-in rule `code`: tests of the row, run on the program of the response in a sandbox."""

from __future__ import annotations

import secrets
import time
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from roll_r3.rewards.code.row_tests import Test, tests_of
from roll_r3.rewards.code.sandbox import Limits, run
from roll_r3.rewards.texts import code_of

SECONDS = 120.0
"""Default limit of all tests of a response, seconds."""
_PRINTED = 1 << 20
"""Allowed output beyond twice the expected one, bytes."""


def code(
    response: str,
    row: Mapping[str, Any],
    *,
    reward_type: str = "all",
    seconds: float = 10.0,
    memory_mb: int = 1024,
    total_seconds: float = SECONDS,
) -> float:
    """Return 1 if the response's program passes all tests of the row, else 0; with `share` the share of passed tests.

    Args:
        reward_type: all or share.
        seconds: processor time of a test; twice this may pass in all.
        memory_mb: address space of each process, MiB.
        total_seconds: time for all tests; tests not begun by then count as failed.

    Raises:
        ValueError: the row has no readable tests, or reward_type is another one.
        SandboxError: the sandbox could not be set up.
    """
    if reward_type not in ("all", "share"):
        raise ValueError(f"reward_type must be all or share, got {reward_type!r}")
    token = secrets.token_hex(16)
    program = code_of(response)
    tests = tests_of(row, program, response, token)
    if not program.strip():
        return 0.0
    limits = Limits(seconds=seconds, memory=memory_mb << 20)
    end = time.monotonic() + total_seconds
    passed = 0
    for test in tests:
        if time.monotonic() < end and _passes(test, limits):
            passed += 1
        elif reward_type == "all":
            return 0.0
    return passed / len(tests)


def has_tests(row: Mapping[str, Any], **_: object) -> float:
    """Return 1 if the tests of a row can be read; nothing runs.

    Raises:
        ValueError: they cannot.
    """
    return float(bool(tests_of(row, "", "", "-")))


def _passes(test: Test, limits: Limits) -> bool:
    ended = run(test.program, test.stdin, replace(limits, output=_PRINTED + 2 * test.expected_bytes))
    try:
        return ended.code == 0 and test.passes(ended.output)
    except (ValueError, RecursionError):  # output that is no JSON
        return False
