"""Reading of a file in another dialect: the steps that loading leaves to a translator."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

from roll_r3.config.dialect import KEY, Dialect, given
from roll_r3.config.findings.report import Finding
from roll_r3.config.reading.interpolate import resolve
from roll_r3.config.tree import Keys


@dataclass(frozen=True)
class Tree:
    """A configuration before it is typed, with the results of one step of reading."""

    data: dict[str, Any]
    places: dict[str, str]
    """Dotted path -> `file:line`, or the override as it was typed."""
    findings: tuple[Finding, ...] = ()
    """Findings about values that `data` no longer holds."""
    wrong: tuple[tuple[Keys, Finding], ...] = ()
    """Findings about values to leave out of `data`, and where these are."""


class Translator(Protocol):
    """Steps of reading a file, in their order. None of them raises; `resolve` alone changes its arguments."""

    def dialect_of(self, data: dict[str, Any]) -> Dialect:
        """Return the dialect of a file, given its tree before overrides."""

    def is_key(self, path: str) -> bool:
        """Return true if a dotted path names a key of the other dialect, so that an override may remove it."""

    def reject(self, data: dict[str, Any], places: dict[str, str], dialect: Dialect) -> tuple[Finding, Dialect] | None:
        """Return the reason why a file cannot be read at all, and its dialect; None: it can be."""

    def resolve(self, data: dict[str, Any], places: dict[str, str]) -> Tree:
        """Replace includes and `${...}`, given the tree after overrides."""

    def translate(self, data: dict[str, Any], places: dict[str, str], dialect: Dialect) -> Tree:
        """Return the resolved tree in roll_r3's schema."""


class NoTranslator:
    """Reader of roll_r3's own files alone, such as the configuration in a checkpoint."""

    def dialect_of(self, data: dict[str, Any]) -> Dialect:
        return given(data, Dialect("roll_r3"))

    def is_key(self, path: str) -> bool:
        return False

    def reject(self, data: dict[str, Any], places: dict[str, str], dialect: Dialect) -> None:
        return None

    def resolve(self, data: dict[str, Any], places: dict[str, str]) -> Tree:
        resolved, wrong = resolve(data, places)
        return Tree(resolved, places, wrong=tuple(wrong))

    def translate(self, data: dict[str, Any], places: dict[str, str], dialect: Dialect) -> Tree:
        if not dialect.is_rolls:
            return Tree(data, places)
        why = "this file is written for ROLL, and only a file in roll_r3's own schema can be read here"
        fix = "translate it with `python -m roll_r3.run --config FILE --print-config`"
        return Tree(data, places, wrong=(((KEY,), Finding("bad-value", "error", ((KEY, dialect.name),), why, fix)),))
