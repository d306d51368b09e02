"""Text of others for messages: cut to a readable length, without control characters."""

from __future__ import annotations

_SHOWN = 500
"""Default length in characters."""


def printable(text: str) -> str:
    """Return `text` with unprintable characters as escapes."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def readable(value: object, limit: int = _SHOWN) -> str:
    """Return a value or an error as printable text of at most `limit` characters; an error with its class name."""
    return printable((f"{type(value).__name__}: {value}" if isinstance(value, Exception) else str(value))[:limit])
