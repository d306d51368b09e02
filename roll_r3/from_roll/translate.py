"""Translation of a tree from ROLL's schema to roll_r3's."""

from __future__ import annotations

from typing import Any

from roll_r3.config.dialect import KEY, Dialect, DialectName, named
from roll_r3.config.findings.report import ABSENT, Finding
from roll_r3.config.tree import join
from roll_r3.from_roll.defaults import fill_in_defaults
from roll_r3.from_roll.draft import Draft
from roll_r3.from_roll.signs import dialect_of, is_clear
from roll_r3.from_roll.tables import TABLES


def translate(
    data: dict[str, Any], places: dict[str, str], dialect: DialectName | None = None
) -> tuple[dict[str, Any], dict[str, str], list[Finding]]:
    """Translate a tree from ROLL's schema to roll_r3's.

    Shared keys and unknown keys stay: the models report errors in them. Nothing raises.

    Args:
        data: the tree after includes, overrides and interpolation. It is not changed.
        places: dotted path -> where it was written.
        dialect: dialect of the file; None: the dialect of `data` itself.

    Returns:
        The tree without ROLL's own keys. The places of old and new keys: findings name the old ones. The findings:
        `roll-translated` and `roll-defaults` (notes), `roll-unsupported` (one error for all keys) and `roll-unread`
        (one warning for all keys). A file of roll_r3's own gives the same tree and no findings.
    """
    dialect = dialect or dialect_of(data).name
    draft = Draft(data, places, is_rolls=dialect == "roll")
    for steps, rows in TABLES.values():
        for step in steps:
            step(draft)
        for row in rows:
            for pattern in row.keys:
                for keys in draft.expand(pattern):
                    row.treatment.apply(draft, keys)
    fill_in_defaults(draft)
    if draft.get(KEY) == "roll":
        draft.put(KEY, "roll_r3", KEY)  # the translated tree is roll_r3's
    return draft.data, draft.places, draft.findings()


def ambiguity(data: dict[str, Any], places: dict[str, str], dialect: Dialect) -> list[Finding]:
    """Return a warning if the other dialect is possible and gives other settings.

    Args:
        data: as for `translate`.
        dialect: dialect of the file.
    """
    if is_clear(dialect):
        return []
    names: tuple[DialectName, DialectName] = (dialect.name, "roll_r3" if dialect.is_rolls else "roll")
    read, otherwise = (translate(data, places, name)[0] for name in names)
    differing = _differences(read, otherwise)
    if not differing:
        return []
    why = (
        f"the file has keys of ROLL ({named(dialect.rolls)}) and "
        f"{'keys of roll_r3 (' + named(dialect.ours) + ')' if dialect.ours else 'none of roll_r3 alone'}; "
        f"it is read as a file {'for ROLL' if dialect.is_rolls else 'of roll_r3'}, and these settings depend on it"
    )
    fix = "write `dialect: roll` or `dialect: roll_r3` at the top of the file"
    return [Finding("dialect-unclear", "warning", tuple(differing), why, fix)]


def _differences(one: Any, other: Any, path: str = "") -> list[tuple[str, object]]:
    """Return (dotted path, value in `one`) of each difference; a list differs as a whole."""
    one, other = (
        ({} if mine is ABSENT and isinstance(its, dict) else mine) for mine, its in ((one, other), (other, one))
    )
    if not (isinstance(one, dict) and isinstance(other, dict)):
        return [] if repr(one) == repr(other) else [(path, one)]  # as text, a NaN equals itself
    return [
        item
        for key in one | other
        for item in _differences(one.get(key, ABSENT), other.get(key, ABSENT), join(path, str(key)))
    ]
