"""The rule `math`: math-verify's judgement, within limits."""

from __future__ import annotations

import re
from functools import lru_cache
from itertools import product
from typing import Any

from math_verify import parse, verify

from roll_r3.rewards.limits import limits
from roll_r3.rewards.rules import Undecided

SECONDS = 2.0
"""Default limit of processor time for one response: ordinary answers take 0.2 at most."""
_MEMORY = 2 << 30
"""Bytes for one response."""
_ESCAPED_DOLLAR = re.compile(r"(?<!\\)((?:\\\\)*)\\\$")
r"""The currency: `\$`, but not the `$` after a line break `\\`."""
_SHOWN = 200


def math(response: str, ground_truth: str, *, seconds: float = SECONDS) -> float:
    """1 if math-verify finds the response's final answer equal to the ground truth; else 0.

    Args:
        seconds: of processor time.

    Raises:
        Undecided: math-verify took longer, needed too much memory, or failed on the response.
        ValueError: this is not the main thread, where alone time can be bounded.
    """
    with limits(seconds, _MEMORY, Undecided):
        try:
            return float(_equal(_truth(ground_truth), _parsed(response)))
        except Exception as error:  # whatever math-verify, sympy and the parser raise is about this response
            raise Undecided(f"raised {type(error).__name__}: {str(error)[:_SHOWN]}") from error


def can_be_matched(ground_truth: str, *, seconds: float = SECONDS) -> float:
    """1 if the ground truth itself is a right answer, in a box or as it is; else 0.

    Raises:
        Undecided: as `math`.
    """
    answers = (rf"\boxed{{{ground_truth}}}", ground_truth)
    return float(any(math(answer, ground_truth, seconds=seconds) for answer in answers))


def _equal(truth: list[Any], answer: list[Any]) -> bool:
    """Compare two lists like `verify`, but report a pair that cannot be compared.

    Raises:
        Exception: no pair is equal, and this is why one of them could not be compared.
    """
    failed: Exception | None = None
    for pair in product(truth, answer):
        try:
            if verify(*pair, timeout_seconds=None, raise_on_error=True):
                return True
        except Exception as error:  # noqa: BLE001  of any kind
            failed = error
    if failed is not None:
        raise failed
    return False


@lru_cache(maxsize=4096)
def _truth(text: str) -> list[Any]:
    """Expressions of a ground truth: mathematics, with or without delimiters. A group's responses share it."""
    text = _without_currency(text)
    return _parsed(text if "$" in text else f"${text}$")


def _parsed(text: str) -> list[Any]:
    """Expressions that math-verify finds, the preferred one first."""
    return list(parse(_without_currency(text), parsing_timeout=None, raise_on_error=True))


def _without_currency(text: str) -> str:
    r"""An escaped dollar delimits nothing, and math-verify finds no number behind one."""
    return _ESCAPED_DOLLAR.sub(r"\1", text)
