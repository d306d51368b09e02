"""Dialect of a file: ROLL's keys and defaults, or roll_r3's. It is decided once, and a report begins with it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

DialectName = Literal["roll", "roll_r3"]
KEY = "dialect"
"""Root key with the dialect; it takes precedence over all other keys."""
_SHOWN = 3
"""Number of signs shown in a report."""


@dataclass(frozen=True)
class Dialect:
    """Dialect of one file, and the keys that decided it."""

    name: DialectName
    given: bool = False
    """True if the file or an override has the key `dialect`."""
    rolls: tuple[str, ...] = ()
    """Patterns of keys in ROLL alone, the strongest signs first."""
    ours: tuple[str, ...] = ()
    """Patterns of keys in roll_r3 alone."""

    @property
    def is_rolls(self) -> bool:
        return self.name == "roll"

    def line(self, file: str) -> str:
        """Return one line for a report."""
        read = f"{file} is read as a file {'for ROLL' if self.is_rolls else 'of roll_r3'} (dialect: {self.name})"
        if self.given:
            return f"{read}, as stated"
        if self.is_rolls:
            return f"{read}: {named(self.rolls)}. `dialect: roll` in the file makes it certain"
        return f"{read}, although it has keys of ROLL: {named(self.rolls)}" if self.rolls else read


def given(data: dict[str, Any], otherwise: Dialect) -> Dialect:
    """Return the dialect in the key `dialect`, or `otherwise` if there is none or an unknown one."""
    names: tuple[DialectName, ...] = ("roll", "roll_r3")
    name = next((name for name in names if name == data.get(KEY)), None)
    return otherwise if name is None else Dialect(name, True, otherwise.rolls, otherwise.ours)


def named(signs: tuple[str, ...]) -> str:
    """Return the first signs, and the number of others."""
    if len(signs) <= _SHOWN:
        return ", ".join(signs)
    return f"{', '.join(signs[:_SHOWN])} and {len(signs) - _SHOWN} more keys"
