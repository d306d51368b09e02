"""Rows of the key tables: patterns of ROLL's keys, and their treatment."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any, Protocol

from roll_r3.config.findings.report import show_value
from roll_r3.config.reading.field_paths import fields_at
from roll_r3.config.tree import Keys, join
from roll_r3.from_roll.draft import Draft

Step = Callable[[Draft], None]
"""Function for several keys together; it runs before the rows of its table."""


class Treatment(Protocol):
    """Treatment of a key."""

    def apply(self, draft: Draft, keys: Keys) -> None: ...

    def describe(self) -> str:
        """Return the text of docs/from_roll.md about the key."""


@dataclass(frozen=True)
class Row:
    """Keys of ROLL with one treatment."""

    names: str | tuple[str, ...]
    """Patterns of `Draft.expand`; text with spaces between them, or one by one."""
    treatment: Treatment

    @property
    def keys(self) -> tuple[str, ...]:
        return tuple(self.names.split()) if isinstance(self.names, str) else self.names


@dataclass(frozen=True)
class Same:
    """Key with the same meaning in roll_r3."""

    remark: str = ""

    def apply(self, draft: Draft, keys: Keys) -> None:
        """Leave the key to the models."""

    def describe(self) -> str:
        return f"the same{f'; {self.remark}' if self.remark else ''}"


@dataclass(frozen=True)
class ByStep:
    """Key handled by a step, together with others."""

    text: str

    def apply(self, draft: Draft, keys: Keys) -> None:
        """Do nothing: the step ran before."""

    def describe(self) -> str:
        return self.text


@dataclass(frozen=True)
class Unread:
    """Key without effect on training."""

    reason: str

    def apply(self, draft: Draft, keys: Keys) -> None:
        if not draft.is_rolls and keys[-1] in field_names():
            return  # in roll_r3's own file this is a misplaced field, reported by the models
        draft.unread(keys)

    def describe(self) -> str:
        return self.reason


@dataclass(frozen=True)
class Unsupported:
    """Switch not supported by roll_r3; values that mean off are dropped."""

    off: tuple[Any, ...]
    reason: str

    def apply(self, draft: Draft, keys: Keys) -> None:
        value = draft.get(keys)
        if value is None or any(value == off and isinstance(value, bool) == isinstance(off, bool) for off in self.off):
            draft.drop(keys)
        else:
            draft.refuse(keys, self.reason)

    def describe(self) -> str:
        return self.reason

    def off_values(self) -> str:
        """Return the values that mean off, as code."""
        return ", ".join(f"`{show_value(off)}`" for off in self.off) or "`null`"


@dataclass(frozen=True)
class Renamed:
    """Key with another name in roll_r3."""

    to: str
    """Path of the new key; `<role>` is the role of the old one."""
    why: str

    def apply(self, draft: Draft, keys: Keys) -> None:
        if draft.get(keys) is None:
            draft.drop(keys)
        else:
            draft.translate(keys, {self.to.replace("<role>", str(keys[0])): draft.get(keys)}, self.why)

    def describe(self) -> str:
        return f"`{self.to}`, {self.why}"


@dataclass(frozen=True)
class Custom:
    """Key handled by a function."""

    function: Callable[[Draft, Keys], None]
    text: str

    def apply(self, draft: Draft, keys: Keys) -> None:
        self.function(draft, keys)

    def describe(self) -> str:
        return self.text


@cache
def field_names() -> frozenset[str]:
    """Return the names of roll_r3's fields, in any section."""
    names, sections = set(), [""]
    while sections:
        section = sections.pop()
        names |= set(fields_at(section))
        sections += [join(section, name) for name in fields_at(section)]
    return frozenset(names)


def under(section: str, names: str) -> tuple[str, ...]:
    """Return patterns of keys in one section, given their names with spaces between them."""
    return tuple(f"{section}.{name}" for name in names.split())
