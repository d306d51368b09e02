"""The dialect of a file: ROLL's keys and defaults, or roll_r3's. It is decided once, and a report begins with it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

DialectName = Literal["roll", "roll_r3"]
KEY = "dialect"
"""The root key that decides, whatever else stands in the file."""
_SHOWN = 3
"""Signs that a report names."""


@dataclass(frozen=True)
class Dialect:
    """Dialect of one file, and the keys that it was decided by."""

    name: DialectName
    given: bool = False
    """The file or an override says it by the key `dialect`."""
    rolls: tuple[str, ...] = ()
    """Patterns of the keys that ROLL alone has, the most telling first."""
    ours: tuple[str, ...] = ()
    """Patterns of the keys that roll_r3 alone has."""

    @property
    def is_rolls(self) -> bool:
        return self.name == "roll"

    def line(self, file: str) -> str:
        """One line for people."""
        read = f"{file} is read as a file {'for ROLL' if self.is_rolls else 'of roll_r3'} (dialect: {self.name})"
        if self.given:
            return f"{read}, as it says"
        if self.is_rolls:
            return f"{read}: {named(self.rolls)}. `dialect: roll` in the file settles it"
        return f"{read}, although it has keys of ROLL: {named(self.rolls)}" if self.rolls else read


def named(signs: tuple[str, ...]) -> str:
    """The first signs by name, and how many more there are."""
    if len(signs) <= _SHOWN:
        return ", ".join(signs)
    return f"{', '.join(signs[:_SHOWN])} and {len(signs) - _SHOWN} more keys"
