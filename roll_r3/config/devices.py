"""Parser of `device_mapping`: a list, a range, or ROLL's `list(range(0,8))` text. Parsed, never evaluated."""

from __future__ import annotations

import re
from typing import Annotated, Any

from pydantic import BeforeValidator, Field

from roll_r3.config.findings.report import show_value

MAX_DEVICES = 1 << 16
"""Largest number of devices of a cluster, and so of a role. Devices are numbered from 0."""
MAX_TEXT = 1 << 16
"""Largest length of a device mapping in characters."""
_MAX_DIGITS = 18

_INT = r"\s*(-?\d+)\s*"
_RANGE = re.compile(rf"range\({_INT}(?:,{_INT})?(?:,{_INT})?\)")
_ITEM = re.compile(_INT)


def parse_devices(value: Any) -> Any:
    """Parse a set of devices.

    Accepts a list of integers, an integer (one device), or text: `range(8)`, `range(0, 8)`, `range(0, 16, 2)`,
    `list(range(...))`, `[0, 1, 2]`, and sums of these (`list(range(0,4)) + list(range(8,12))`). Returns anything else
    unchanged, for the model to reject.

    Raises:
        ValueError: text of another form, an empty range, or more than `MAX_DEVICES` devices.
    """
    if isinstance(value, int) and not isinstance(value, bool):
        return [value]
    if not isinstance(value, str):
        return value
    if len(value) > MAX_TEXT:
        raise ValueError(
            f"{show_value(value)!r} is {len(value):,} characters long, at most {MAX_TEXT:,} are read: write ranges"
        )
    devices: list[int] = []
    for part in value.split("+"):
        devices += _parse_part(part.strip(), value, room=MAX_DEVICES - len(devices))
    return devices


def _parse_part(part: str, whole: str, *, room: int) -> list[int]:
    """Return the devices of one part of `whole`, at most `room`."""
    inner = part[5:-1].strip() if part.startswith("list(") and part.endswith(")") else part
    if match := _RANGE.fullmatch(inner):
        start, stop, step = _ends([_number(text, whole) for text in match.groups() if text is not None])
        if step == 0:
            raise ValueError(f"{show_value(whole)!r}: the step of a range must not be 0")
        count = -(-(stop - start) // step)  # not len(range(...)), which has a largest number
        if count < 1:
            raise ValueError(f"{show_value(whole)!r} names no devices: the range is empty")
        _require_room(count, room, whole)
        return list(range(start, stop, step))
    if items := _items(inner):
        _require_room(len(items), room, whole)
        return [_number(text, whole) for text in items]
    raise ValueError(
        f"{show_value(whole)!r} is not a device mapping: write list(range(0,8)), range(0,8) or [0,1,2] "
        "(it is parsed, not evaluated)"
    )


def _ends(numbers: list[int]) -> tuple[int, int, int]:
    """Return start, end and step of a range from its arguments, as Python does."""
    if len(numbers) == 1:
        return 0, numbers[0], 1
    return numbers[0], numbers[1], numbers[2] if len(numbers) == 3 else 1


def _items(text: str) -> list[str]:
    """Return the numbers of `[0, 1, 2]`; none for text of another form."""
    if not (text.startswith("[") and text.endswith("]")):
        return []
    items = text[1:-1].split(",")
    if len(items) > 1 and not items[-1].strip():
        items.pop()  # a comma behind the last
    matches = [_ITEM.fullmatch(item) for item in items]
    return [match[1] for match in matches if match] if all(matches) else []


def _number(text: str, whole: str) -> int:
    if len(text) > _MAX_DIGITS:
        raise ValueError(
            f"{show_value(whole)!r} holds a number of {len(text)} digits: devices are numbered from 0 to "
            f"{MAX_DEVICES - 1}"
        )
    return int(text)


def _require_room(count: int, room: int, whole: str) -> None:
    if count > room:
        raise ValueError(f"{show_value(whole)!r} names more devices than {MAX_DEVICES:,}")


_Device = Annotated[int, Field(ge=0, lt=MAX_DEVICES)]
Devices = Annotated[
    tuple[_Device, ...], BeforeValidator(parse_devices, json_schema_input_type=tuple[_Device, ...] | _Device | str)
]
