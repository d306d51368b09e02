"""Reading of a judge's verdict."""

from __future__ import annotations

import math
import re

from roll_r3.rewards.texts import after_thought, last_boxed

_YES_NO = re.compile(r"\b(?:yes|no)\b", re.IGNORECASE)
_NUMBER = re.compile(r"[-+]?(?:\d+\.?\d*|\.\d+)")
_THINK = "<think>"
_LAST = 8192
"""Number of characters read, at the end of a verdict."""


def read_verdict(text: str, score: str) -> float | None:
    """Return the score in a verdict; None if there is none, or the thought before it is unfinished.

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
    matches = list(re.finditer(score, text))
    return _finite(matches[-1][1]) if matches else None


def _finite(text: str | None) -> float | None:
    try:
        value = float((text or "").strip().rstrip("."))
    except ValueError:
        return None
    return value if math.isfinite(value) else None
