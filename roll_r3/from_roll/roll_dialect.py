"""Translator of ROLL's files for `roll_r3.config.load`."""

from __future__ import annotations

from typing import Any

from roll_r3.config.dialect import Dialect
from roll_r3.config.findings.report import Finding
from roll_r3.config.translator import Tree
from roll_r3.from_roll.draft import matches
from roll_r3.from_roll.includes import resolve
from roll_r3.from_roll.pipelines import other_pipeline
from roll_r3.from_roll.signs import dialect_of
from roll_r3.from_roll.tables import ALL_ROWS
from roll_r3.from_roll.translate import ambiguity, translate


class RollTranslator:
    """Reader of ROLL's files, and of roll_r3's own: ROLL's keys are translated in either."""

    def dialect_of(self, data: dict[str, Any]) -> Dialect:
        return dialect_of(data)

    def is_key(self, path: str) -> bool:
        return any(matches(pattern, path) for row in ALL_ROWS for pattern in row.keys)

    def reject(self, data: dict[str, Any], places: dict[str, str], dialect: Dialect) -> tuple[Finding, Dialect] | None:
        """Reject a file of another pipeline of ROLL, unless it has `dialect: roll_r3`."""
        other = None if dialect.given and not dialect.is_rolls else other_pipeline(data, places)
        if other is None:
            return None
        return other, dialect if dialect.is_rolls else Dialect("roll", rolls=tuple(path for path, _ in other.found))

    def resolve(self, data: dict[str, Any], places: dict[str, str]) -> Tree:
        return resolve(data, places)

    def translate(self, data: dict[str, Any], places: dict[str, str], dialect: Dialect) -> Tree:
        unclear = ambiguity(data, places, dialect)
        translated, places, findings = translate(data, places, dialect.name)
        return Tree(translated, places, (*findings, *unclear))


ROLL = RollTranslator()
