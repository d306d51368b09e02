"""Strict JSON: what Python's parser would change or choose among is refused, and numbers keep their digits."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from roll_r3.config.readable import readable
from roll_r3.data.faults import Refused, shown

DEEPEST = 100
"""Levels of lists and objects in a row."""
_LONGEST_NUMBER = 4000
"""Digits of a whole number, some fewer than Python converts."""


@dataclass(frozen=True, slots=True)
class Number:
    """A number of which Python's int or float would lose how it is written."""

    text: str

    def __str__(self) -> str:
        return self.text


def _whole(text: str) -> int | Number:
    if len(text) > _LONGEST_NUMBER:
        raise Refused("long-number", f"a number has {len(text)} digits", "write it as text, in quotes")
    return Number(text) if text == "-0" else int(text)


def _constant(text: str) -> Any:
    raise Refused("constant", f"{text} is not a value of JSON", "write a number, text or null")


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise Refused("twice", f"the key {shown(twice)} is there twice", "leave one of the two out")
    return found


_DECODER = json.JSONDecoder(object_pairs_hook=_object, parse_float=Number, parse_int=_whole, parse_constant=_constant)


def parse(text: str) -> Any:
    """The value of a JSON text; numbers with a point, an exponent or a negative zero are `Number`s.

    Raises:
        Refused: it is not JSON, or it holds a key twice, half of a surrogate pair, or more levels than `DEEPEST`.
    """
    try:
        value = _DECODER.decode(text)
    except json.JSONDecodeError as error:
        where = f"line {error.lineno} column {error.colno}" if error.lineno > 1 else f"column {error.colno}"
        said = readable(error.msg.removesuffix(" at"))
        cut = " (it seems to be cut off)" if error.pos >= len(text.rstrip()) or "Unterminated" in error.msg else ""
        raise Refused("not-json", f"not JSON, {said} at {where}{cut}", "write valid JSON") from error
    except RecursionError as error:
        raise too_deep() from error
    if "\\u" in text or text.count("[") + text.count("{") > DEEPEST:
        check(value)
    return value


def too_deep() -> Refused:
    return Refused("deep", f"more than {DEEPEST} levels of lists and objects", "write it with fewer levels")


def check(value: Any, depth: int = 0) -> None:
    """Look through a value for text that is not Unicode, and for too many levels.

    Raises:
        Refused: there are some.
    """
    if isinstance(value, str):
        try:
            value.encode()
        except UnicodeEncodeError as error:
            raise Refused(
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
    """The value with every `Number` as Python's int or float.

    Raises:
        Refused: a number is beyond the range of a float.
    """
    if isinstance(value, Number):
        if value.text == "-0":
            return 0
        number = float(value.text)
        if number in (float("inf"), float("-inf")):
            raise Refused("large-number", f"the number {readable(value.text, 60)} is too large", "write it as text")
        return number
    if isinstance(value, dict):
        return {key: plain(inner) for key, inner in value.items()}
    return [plain(inner) for inner in value] if isinstance(value, list) else value
