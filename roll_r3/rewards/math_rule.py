"""Built-in rule `math`: the verdict of math-verify, within limits of time and memory."""

from __future__ import annotations

import re
from functools import lru_cache
from itertools import product
from typing import Any

from math_verify import parse, verify

from roll_r3.rewards.limits import limits
from roll_r3.rewards.rules import Undecided

SECONDS = 2.0
"""Default limit of processor time per response, seconds; ordinary answers take at most 0.2."""
_MEMORY = 2 << 30
"""Memory limit per response, bytes."""
_ESCAPED_DOLLAR = re.compile(r"(?<!\\)((?:\\\\)*)\\\$")
r"""Currency sign `\$`, but not the `$` after a line break `\\`."""
_SHOWN = 200


def math(response: str, ground_truth: str, *, seconds: float = SECONDS) -> float:
    """Return 1 if math-verify finds the response's final answer equal to the ground truth, else 0.

    Args:
        seconds: limit of processor time.

    Raises:
        Undecided: math-verify took longer, needed too much memory, or failed on the response.
        ValueError: not called in the main thread, as required by the time limit.
    """
    with limits(seconds, _MEMORY, Undecided):
        try:
            return float(_equal(_truth(ground_truth), _parsed(response)))
        except Exception as error:  # errors of math-verify, sympy and the parser all concern this response
            raise Undecided(f"raised {type(error).__name__}: {str(error)[:_SHOWN]}") from error


def can_be_matched(ground_truth: str, *, seconds: float = SECONDS) -> float:
    """Return 1 if the ground truth itself, boxed or plain, is a correct answer, else 0.

    Raises:
        Undecided: see `math`.
    """
    answers = (rf"\boxed{{{ground_truth}}}", ground_truth)
    return float(any(math(answer, ground_truth, seconds=seconds) for answer in answers))


def _equal(truth: list[Any], answer: list[Any]) -> bool:
    """Compare two lists like `verify`, but raise if a pair cannot be compared.

    Raises:
        Exception: no pair is equal, and one could not be compared; its error.
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
    """Parse a ground truth: mathematics, with or without delimiters. Cached for the responses of a group."""
    text = _without_currency(text)
    return _parsed(text if "$" in text else f"${text}$")


def _parsed(text: str) -> list[Any]:
    """Parse a text into math-verify's expressions, the preferred one first."""
    return list(parse(_without_currency(text), parsing_timeout=None, raise_on_error=True))


def _without_currency(text: str) -> str:
    r"""Unescape dollars: an escaped dollar is not a delimiter, and math-verify misses the number behind it."""
    return _ESCAPED_DOLLAR.sub(r"\1", text)
