"""What a row of the key table says about ROLL's keys, and what is done with them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any, Protocol

from roll_r3.config.explain import fields_at
from roll_r3.config.report import show_value
from roll_r3.config.roll_yaml.draft import Draft
from roll_r3.config.tree import Keys, join

Step = Callable[[Draft], None]
"""Looks at several keys together, before the rows of its table."""


class Treatment(Protocol):
    """What becomes of a key."""

    def apply(self, draft: Draft, keys: Keys) -> None: ...

    def describe(self) -> str: ...


@dataclass(frozen=True)
class Row:
    """ROLL's keys that are treated alike, as patterns of `Draft.expand`."""

    keys: tuple[str, ...]
    treatment: Treatment


@dataclass(frozen=True)
class Same:
    """The key is roll_r3's too, with the same meaning."""

    remark: str = ""

    def apply(self, draft: Draft, keys: Keys) -> None:
        """Leave it to the models."""

    def describe(self) -> str:
        return f"the same{f'; {self.remark}' if self.remark else ''}"


@dataclass(frozen=True)
class Joint:
    """A step looks at the key together with others."""

    text: str

    def apply(self, draft: Draft, keys: Keys) -> None:
        """A step did."""

    def describe(self) -> str:
        return self.text


@dataclass(frozen=True)
class Unread:
    """Leaving the key out changes nothing."""

    reason: str

    def apply(self, draft: Draft, keys: Keys) -> None:
        if not draft.is_rolls and keys[-1] in names_of_ours():
            return  # in a file of our own this is a field in the wrong place, which the models say
        if draft.get(keys) is None:
            draft.drop(keys)
        else:
            draft.unread(keys)

    def describe(self) -> str:
        return f"no effect: {self.reason}"


@dataclass(frozen=True)
class Off:
    """A switch that roll_r3 does not have: it may stand on what means off."""

    off: tuple[Any, ...]
    reason: str

    def apply(self, draft: Draft, keys: Keys) -> None:
        value = draft.get(keys)
        if value is None or any(value == off and isinstance(value, bool) == isinstance(off, bool) for off in self.off):
            draft.drop(keys)
        else:
            draft.refuse(keys, self.reason)

    def describe(self) -> str:
        names = " or ".join(f"`{show_value(off)}`" for off in self.off) or "`null`"
        return f"not supported, unless {names}: {self.reason}"


@dataclass(frozen=True)
class Moved:
    """The key has another name."""

    to: str
    """`<role>` stands for the role that the key was found in."""
    why: str

    def apply(self, draft: Draft, keys: Keys) -> None:
        if draft.get(keys) is None:
            draft.drop(keys)
        else:
            draft.translate(keys, {self.to.replace("<role>", str(keys[0])): draft.get(keys)}, self.why)

    def describe(self) -> str:
        return f"`{self.to}`: {self.why}"


@dataclass(frozen=True)
class By:
    """A function knows."""

    function: Callable[[Draft, Keys], None]
    text: str

    def apply(self, draft: Draft, keys: Keys) -> None:
        self.function(draft, keys)

    def describe(self) -> str:
        return self.text


@cache
def names_of_ours() -> frozenset[str]:
    """What fields of roll_r3 are called, wherever they stand."""
    names, sections = set(), [""]
    while sections:
        section = sections.pop()
        names |= set(fields_at(section))
        sections += [join(section, name) for name in fields_at(section)]
    return frozenset(names)


def under(section: str, *names: str) -> tuple[str, ...]:
    """Patterns of keys in one section."""
    return tuple(f"{section}.{name}" for name in names)
