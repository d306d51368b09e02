"""Final answer within a response, to compare responses with each other."""

from __future__ import annotations

import re

_BRACE = re.compile(r"\\boxed\{|[{}]")


def final_answer(response: str) -> str:
    r"""Return the content of the last closed `\boxed{}`, else the last line with text; spaces are left out.

    >>> final_answer(r"so x is \boxed{\frac{1}{2}}.")
    '\\frac{1}{2}'
    >>> final_answer("3 + 4\n= 7\n")
    '=7'
    """
    inside = _last_boxed(response)
    if inside is not None:
        return "".join(inside.split())
    lines = [line for line in response.splitlines() if line.strip()]
    return "".join(lines[-1].split()) if lines else ""


def _last_boxed(text: str) -> str | None:
    r"""Return the content of the closed `\boxed{}` that begins last; None if there is none."""
    opened: list[tuple[int, bool]] = []
    last, end = -1, -1
    for brace in _BRACE.finditer(text):
        if brace[0] != "}":
            opened.append((brace.end(), brace[0] != "{"))
        elif opened:
            start, is_boxed = opened.pop()
            if is_boxed and start > last:
                last, end = start, brace.start()
    return None if end < 0 else text[last:end]
