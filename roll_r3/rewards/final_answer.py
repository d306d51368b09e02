"""Final answer within a response, to compare responses with each other."""

from __future__ import annotations

_BOXED = "\\boxed{"


def final_answer(response: str) -> str:
    r"""Return the content of the last closed `\boxed{}`, else the last line with text; spaces are left out.

    >>> final_answer(r"so x is \boxed{\frac{1}{2}}.")
    '\\frac{1}{2}'
    >>> final_answer("3 + 4\n= 7\n")
    '=7'
    """
    start = len(response)
    while (start := response.rfind(_BOXED, 0, start)) >= 0:
        inside = _until_closed(response, start + len(_BOXED))
        if inside is not None:
            return "".join(inside.split())
    lines = [line for line in response.splitlines() if line.strip()]
    return "".join(lines[-1].split()) if lines else ""


def _until_closed(text: str, start: int) -> str | None:
    """Return the text up to the brace that closes an open one; None if it is missing."""
    depth = 1
    for end in range(start, len(text)):
        depth += {"{": 1, "}": -1}.get(text[end], 0)
        if not depth:
            return text[start:end]
    return None
