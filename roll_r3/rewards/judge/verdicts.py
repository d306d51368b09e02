"""Reading of a judge's verdict."""

from __future__ import annotations

import math
import re

import regex

from roll_r3.rewards.texts import after_thought, last_boxed

_YES_NO = re.compile(r"\b(?:yes|no)\b", re.IGNORECASE)
_NUMBER = re.compile(r"[-+]?(?:\d+\.?\d*|\.\d+)")
_THINK = "<think>"
_LAST = 8192
"""Number of characters read, at the end of a verdict."""
_MATCHING_S = 1.0
"""Seconds for a user's pattern, which may backtrack without end. It is matched beside the training loop."""


def read_verdict(text: str, score: str) -> float | None:
    """Return the score in a verdict; None if there is none, the thought before it is unfinished, or the
    pattern takes longer than a second.

    Args:
        score: yes_no, boxed, or a regular expression with a group for the number.
    """
    text = after_thought(text)
    if text.lstrip().startswith(_THINK):
        return None
    text = text[-_LAST:]
    if score == "yes_no":
        words = _YES_NO.findall(text)
        return None if not words else float(words[-1].lower() == "yes")
    if score == "boxed":
        found = last_boxed(text)
        number = None if found is None else _NUMBER.search(found)
        return None if number is None else _finite(number[0])
    try:
        matches = list(regex.finditer(score, text, timeout=_MATCHING_S))
    except TimeoutError:
        return None
    return _finite(matches[-1][1]) if matches else None


def _finite(text: str | None) -> float | None:
    try:
        value = float((text or "").strip().rstrip("."))
    except ValueError:
        return None
    return value if math.isfinite(value) else None
