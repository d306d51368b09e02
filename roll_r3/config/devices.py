"""`device_mapping`: a list, a range, or ROLL's `list(range(0,8))` text. Parsed, never evaluated."""

from __future__ import annotations

import re
from typing import Annotated, Any

from pydantic import BeforeValidator, Field

_INT = r"\s*(-?\d+)\s*"
_RANGE = re.compile(rf"range\({_INT}(?:,{_INT})?(?:,{_INT})?\)")
_LIST = re.compile(rf"\[{_INT}(?:,{_INT})*,?\s*\]")
MAX_DEVICES = 1 << 20


def parse_devices(value: Any) -> Any:
    """Read what a user may write for a set of devices.

    Accepts a list of integers, an integer (that one device), or text: `range(8)`, `range(0, 8)`, `range(0, 16, 2)`,
    `list(range(...))`, `[0, 1, 2]`, and sums of those (`list(range(0,4)) + list(range(8,12))`). Anything else is
    returned as it is, for the model to refuse.

    Raises:
        ValueError: text of another form, or a range that is empty or absurdly large.
    """
    if isinstance(value, int) and not isinstance(value, bool):
        return [value]
    if not isinstance(value, str):
        return value
    devices: list[int] = []
    for part in value.split("+"):
        devices += _parse_part(part.strip(), value)
    return devices


def _parse_part(part: str, whole: str) -> list[int]:
    inner = part[5:-1].strip() if part.startswith("list(") and part.endswith(")") else part
    if match := _RANGE.fullmatch(inner):
        numbers = [int(g) for g in match.groups() if g is not None]
        if len(numbers) == 3 and numbers[2] == 0:
            raise ValueError(f"{whole!r}: the step of a range must not be 0")
        span = range(*numbers)
        if not 0 < len(span) <= MAX_DEVICES:
            raise ValueError(f"{whole!r} names {len(span)} devices")
        return list(span)
    if _LIST.fullmatch(inner):
        return [int(n) for n in inner.strip("[]").split(",") if n.strip()]
    raise ValueError(
        f"{whole!r} is not a device mapping: write list(range(0,8)), range(0,8) or [0,1,2] "
        "(it is parsed, not evaluated)"
    )


_Device = Annotated[int, Field(ge=0)]
Devices = Annotated[
    tuple[_Device, ...], BeforeValidator(parse_devices, json_schema_input_type=tuple[_Device, ...] | _Device | str)
]
