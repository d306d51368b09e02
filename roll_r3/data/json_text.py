"""Strict JSON parser: rejects text that Python's parser would alter; numbers keep their digits."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from roll_r3.config.findings.readable import readable
from roll_r3.data.faults import DataError, shown

DEEPEST = 100
"""Maximum nesting of lists and objects in a row."""
_LONGEST_NUMBER = 4000
"""Maximum digits of an integer, below Python's own limit."""


@dataclass(frozen=True, slots=True)
class Number:
    """Number whose notation Python's int or float would lose."""

    text: str

    def __str__(self) -> str:
        return self.text


def _whole(text: str) -> int | Number:
    if len(text) > _LONGEST_NUMBER:
        raise DataError("long-number", f"a number has {len(text)} digits", "write it as text, in quotes")
    return Number(text) if text == "-0" else int(text)


def _constant(text: str) -> Any:
    raise DataError("constant", f"{text} is not a value of JSON", "write a number, text or null")


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise DataError("twice", f"the key {shown(twice)} occurs twice", "remove one of the two")
    return found


_DECODER = json.JSONDecoder(object_pairs_hook=_object, parse_float=Number, parse_int=_whole, parse_constant=_constant)


def parse(text: str) -> Any:
    """Parse a JSON text; numbers with a point, an exponent or a negative zero become `Number`s.

    Raises:
        DataError: not JSON, a repeated key, half of a surrogate pair, or more levels than `DEEPEST`.
    """
    try:
        value = _DECODER.decode(text)
    except json.JSONDecodeError as error:
        where = f"line {error.lineno} column {error.colno}" if error.lineno > 1 else f"column {error.colno}"
        problem = readable(error.msg.removesuffix(" at"))
        cut = (
            " (the text seems to be truncated)"
            if error.pos >= len(text.rstrip()) or "Unterminated" in error.msg
            else ""
        )
        raise DataError("not-json", f"not JSON, {problem} at {where}{cut}", "write valid JSON") from error
    except RecursionError as error:
        raise too_deep() from error
    if "\\u" in text or text.count("[") + text.count("{") > DEEPEST:
        check(value)
    return value


def too_deep() -> DataError:
    return DataError("deep", f"more than {DEEPEST} levels of lists and objects", "use fewer levels")


def check(value: Any, depth: int = 0) -> None:
    """Check a value for invalid Unicode and too many levels.

    Raises:
        DataError: either was found.
    """
    if isinstance(value, str):
        try:
            value.encode()
        except UnicodeEncodeError as error:
            raise DataError(
                "surrogate", f"half of a surrogate pair, \\u{ord(value[error.start]):04x}", "write the whole character"
            ) from error
    elif isinstance(value, dict | list):
        if depth >= DEEPEST:
            raise too_deep()
        for key in value if isinstance(value, dict) else ():
            check(key)
        for inner in value.values() if isinstance(value, dict) else value:
            check(inner, depth + 1)


def plain(value: Any) -> Any:
    """Convert every `Number` in a value to int or float.

    Raises:
        DataError: a number exceeds the range of a float.
    """
    if isinstance(value, Number):
        if value.text == "-0":
            return 0
        number = float(value.text)
        if number in (float("inf"), float("-inf")):
            raise DataError("large-number", f"the number {readable(value.text, 60)} is too large", "write it as text")
        return number
    if isinstance(value, dict):
        return {key: plain(inner) for key, inner in value.items()}
    return [plain(inner) for inner in value] if isinstance(value, list) else value
