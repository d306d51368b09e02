"""Signs of the dialect that a file is written in: keys that ROLL alone has, and keys that roll_r3 alone has."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import cache
from typing import Any

from roll_r3.config.dialect import KEY, Dialect, DialectName
from roll_r3.config.explain import fields_at
from roll_r3.config.roll_yaml.draft import Draft
from roll_r3.config.roll_yaml.rows import Row, names_of_ours
from roll_r3.config.tree import Keys, join

REQUIRED = ("rewards.*.worker_cls", "actor_train.data_args.domain_interleave_probs")
"""Keys that no file of ROLL's RLVR pipeline runs without: one of them weighs as much as two others."""
_ENOUGH = 3
"""Keys of ROLL alone that make a file ROLL's, unless those of roll_r3 are more than `_ENOUGH` times as many."""
_CLEAR = 4
"""A file with so many times as many keys of one side as of the other can be read in one way only."""
_REWARD = "rewards.*"


def decide(data: dict[str, Any], rows: Iterable[Row]) -> Dialect:
    """The dialect of a file, from all its keys together, so that no single edit changes it.

    Args:
        data: the tree of the file, before overrides. It is not changed.
        rows: the rows of the key table.
    """
    draft = Draft(data, {})
    rolls, known = [], set()
    for pattern in (pattern for row in rows for pattern in row.keys):
        found = draft.expand(pattern)
        known.update(found)
        if found and pattern.rpartition(".")[2] not in _names():
            rolls.append(pattern)
    rolls.sort(key=lambda pattern: pattern not in REQUIRED)
    ours = tuple(dict.fromkeys(_keys_of_ours(data, "", (), known, data)))
    dialect = Dialect("roll" if _is_rolls(rolls, ours) else "roll_r3", False, tuple(rolls), ours)
    return given(data, dialect)


def given(data: dict[str, Any], otherwise: Dialect) -> Dialect:
    """The dialect that the key `dialect` names; without it, or where it is neither, `otherwise`."""
    names: tuple[DialectName, ...] = ("roll", "roll_r3")
    name = next((name for name in names if name == data.get(KEY)), None)
    return otherwise if name is None else Dialect(name, True, otherwise.rolls, otherwise.ours)


def _is_rolls(rolls: list[str], ours: tuple[str, ...]) -> bool:
    if len(rolls) >= _ENOUGH:
        return len(ours) <= _ENOUGH * len(rolls)
    weight = len(rolls) + sum(pattern in REQUIRED for pattern in rolls)
    return weight > 1 and weight >= len(ours)


def is_clear(dialect: Dialect) -> bool:
    """Return true if the file can hardly be read the other way."""
    rolls, ours = len(dialect.rolls), len(dialect.ours)
    if dialect.given or not rolls:
        return True
    if not dialect.is_rolls:
        return ours >= _CLEAR * rolls
    required = any(pattern in REQUIRED for pattern in dialect.rolls)
    return (required or rolls >= _ENOUGH) and rolls >= _CLEAR * ours


def _keys_of_ours(node: Any, path: str, keys: Keys, known: set[Keys], data: dict[str, Any]) -> Iterator[str]:
    """Patterns of the fields that stand in `node`, and that no row of the table names."""
    if not isinstance(node, dict):
        return
    for name in fields_at(path, data):
        if name not in node or (*keys, name) in known or name == KEY:
            continue
        inner, value = join(path, name), node[name]
        if inner == "rewards" and isinstance(value, dict):
            for reward, section in value.items():
                yield from _keys_of_ours(section, _REWARD, (*keys, name, reward), known, data)
        elif fields_at(inner, data):
            yield from _keys_of_ours(value, inner, (*keys, name), known, data)
        elif inner != "rewards":
            yield inner


@cache
def _names() -> frozenset[str]:
    """Names of roll_r3's fields: a key of such a name may be one of them in the wrong place."""
    return names_of_ours() | frozenset(fields_at(_REWARD))
