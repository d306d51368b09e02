"""A run that was written for ROLL, in roll_r3's own schema."""

from __future__ import annotations

from typing import Any

from roll_r3.config.dialect import KEY, Dialect, DialectName, named
from roll_r3.config.report import ABSENT, Finding
from roll_r3.config.roll_yaml import algorithm, engines, fsdp2, learning, megatron, rewards, roles, run, sglang, vllm
from roll_r3.config.roll_yaml.defaults import fill_in_defaults
from roll_r3.config.roll_yaml.draft import Draft, matches
from roll_r3.config.roll_yaml.rows import Row, Step
from roll_r3.config.roll_yaml.signs import decide, is_clear
from roll_r3.config.tree import join

TABLES: dict[str, tuple[tuple[Step, ...], tuple[Row, ...]]] = {
    "Rewards": (rewards.STEPS, rewards.ROWS),
    "The run": (run.STEPS, run.ROWS),
    "The algorithm": (algorithm.STEPS, algorithm.ROWS),
    "Roles": (roles.STEPS, roles.ROWS),
    "Training, sampling and data": (learning.STEPS, learning.ROWS),
    "Megatron": (megatron.STEPS, megatron.ROWS),
    "FSDP2": (fsdp2.STEPS, fsdp2.ROWS),
    "Rollout engines": (engines.STEPS, engines.ROWS),
    "SGLang": (sglang.STEPS, sglang.ROWS),
    "vLLM": (vllm.STEPS, vllm.ROWS),
}
"""Title -> steps over several keys, then rows. The order matters: which rewards and roles are left is known first."""


def dialect_of(data: dict[str, Any]) -> Dialect:
    """The dialect of a file, given its tree before overrides, see `decide`."""
    return decide(data, (row for _, rows in TABLES.values() for row in rows))


def is_key_of_rolls(path: str) -> bool:
    """Return true if a row of the key table names the key at a dotted path."""
    return any(matches(pattern, path) for _, rows in TABLES.values() for row in rows for pattern in row.keys)


def translate(
    data: dict[str, Any], places: dict[str, str], dialect: DialectName | None = None
) -> tuple[dict[str, Any], dict[str, str], list[Finding]]:
    """A tree in ROLL's schema, in roll_r3's.

    What both have is left as it is, as is what neither knows: the models say what is wrong with it. Nothing raises.

    Args:
        data: the tree after includes, overrides and interpolation. It is not changed.
        places: dotted path -> where it was written.
        dialect: what the file was taken for; None: what `data` itself is taken for.

    Returns:
        The tree, without ROLL's own keys; `places` with those of the new keys beside the old ones, which findings
        name; and the findings: `roll-translated` and `roll-defaults` (notes), `roll-unsupported` (one error for all
        keys) and `roll-unread` (one warning for all keys). For a file of roll_r3's own the same tree and no findings.
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
        draft.put(KEY, "roll_r3", KEY)  # which it is from here on
    return draft.data, draft.places, draft.findings()


def doubt(data: dict[str, Any], places: dict[str, str], dialect: Dialect) -> list[Finding]:
    """A warning where the file could be read as one of the other dialect, and would mean something else then.

    Args:
        data: as for `translate`.
        dialect: what the file was taken for.
    """
    if is_clear(dialect):
        return []
    read, otherwise = (translate(data, places, name)[0] for name in _both(dialect.name))
    differing = _differences(read, otherwise)
    if not differing:
        return []
    why = (
        f"the file has keys of ROLL ({named(dialect.rolls)}) and "
        f"{'keys of roll_r3 (' + named(dialect.ours) + ')' if dialect.ours else 'no key that roll_r3 alone has'}; "
        f"it is read as a file {'for ROLL' if dialect.is_rolls else 'of roll_r3'}, and these settings depend on that"
    )
    fix = "write `dialect: roll` or `dialect: roll_r3` at the top of the file"
    return [Finding("dialect-unclear", "warning", tuple(differing), why, fix)]


def _both(name: DialectName) -> tuple[DialectName, DialectName]:
    return (name, "roll_r3" if name == "roll" else "roll")


def _differences(one: Any, other: Any, path: str = "") -> list[tuple[str, object]]:
    """(dotted path, value in `one`) of what differs; a list differs as a whole."""
    one, other = (
        ({} if mine is ABSENT and isinstance(its, dict) else mine) for mine, its in ((one, other), (other, one))
    )
    if not (isinstance(one, dict) and isinstance(other, dict)):
        return [] if repr(one) == repr(other) else [(path, one)]  # text, so that a NaN is itself
    return [
        item
        for key in one | other
        for item in _differences(one.get(key, ABSENT), other.get(key, ABSENT), join(path, str(key)))
    ]
