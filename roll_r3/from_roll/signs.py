"""Detection of a file's dialect from keys found in ROLL alone and keys found in roll_r3 alone."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from typing import Any

from roll_r3.config.dialect import KEY, Dialect, given
from roll_r3.config.reading.field_paths import fields_at
from roll_r3.config.tree import Keys, join
from roll_r3.from_roll.draft import Draft
from roll_r3.from_roll.key_rows import field_names
from roll_r3.from_roll.tables import ALL_ROWS

REQUIRED = ("rewards.*.worker_cls",)
"""Keys in ROLL alone, and required by its RLVR pipeline: each counts twice."""
_SUFFICIENT = 3
"""Number of keys in ROLL alone sufficient for ROLL's dialect, unless there are too many keys in roll_r3 alone."""
_MAX_RATIO = 3
"""Too many: more than this number of times as many keys in roll_r3 alone as in ROLL alone."""
_CLEAR = 4
"""Ratio of keys of one side to keys of the other from which a dialect is certain."""
_REWARD = "rewards.*"


def dialect_of(data: dict[str, Any]) -> Dialect:
    """Return the dialect of a file. All its keys count together, so no single edit changes it.

    Args:
        data: the tree of the file, before overrides. It is not changed.
    """
    draft = Draft(data, {})
    rolls, known = [], set()
    for pattern in (pattern for row in ALL_ROWS for pattern in row.keys):
        found = draft.expand(pattern)
        known.update(found)
        if found and pattern.rpartition(".")[2] not in _names():
            rolls.append(pattern)
    rolls.sort(key=lambda pattern: pattern not in REQUIRED)
    ours = tuple(dict.fromkeys(_own_keys(data, "", (), known, data)))
    dialect = Dialect("roll" if _is_rolls(rolls, ours) else "roll_r3", False, tuple(rolls), ours)
    return given(data, dialect)


def _is_rolls(rolls: list[str], ours: tuple[str, ...]) -> bool:
    if len(rolls) >= _SUFFICIENT:
        return len(ours) <= _MAX_RATIO * len(rolls)
    weight = len(rolls) + sum(pattern in REQUIRED for pattern in rolls)
    return weight > 1 and weight >= len(ours)


def is_clear(dialect: Dialect) -> bool:
    """Return true if the other dialect is very unlikely."""
    rolls, ours = len(dialect.rolls), len(dialect.ours)
    if dialect.given or not rolls:
        return True
    if not dialect.is_rolls:
        return ours >= _CLEAR * rolls
    required = any(pattern in REQUIRED for pattern in dialect.rolls)
    return (required or rolls >= _SUFFICIENT) and rolls >= _CLEAR * ours


def _own_keys(node: Any, path: str, keys: Keys, known: set[Keys], data: dict[str, Any]) -> Iterator[str]:
    """Yield patterns of the fields in `node` that are in no row of the key tables."""
    if not isinstance(node, dict):
        return
    for name in fields_at(path, data):
        if name not in node or (*keys, name) in known or name == KEY:
            continue
        inner, value = join(path, name), node[name]
        if inner == "rewards" and isinstance(value, dict):
            for reward, section in value.items():
                yield from _own_keys(section, _REWARD, (*keys, name, reward), known, data)
        elif fields_at(inner, data):
            yield from _own_keys(value, inner, (*keys, name), known, data)
        elif inner != "rewards":
            yield inner


@cache
def _names() -> frozenset[str]:
    """Return names of roll_r3's fields: a key with such a name may be a misplaced field."""
    return field_names() | frozenset(fields_at(_REWARD))
