"""What others wrote, for a message: no more than a person reads, and nothing that a terminal or a log chokes on."""

from __future__ import annotations

_SHOWN = 500
"""Characters, unless more are asked for."""


def printable(text: str) -> str:
    """The same with all else as escapes."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def readable(said: object, most: int = _SHOWN) -> str:
    """A value or an error in its own words, cut after so many characters; an error with the name of its kind."""
    return printable((f"{type(said).__name__}: {said}" if isinstance(said, Exception) else str(said))[:most])
