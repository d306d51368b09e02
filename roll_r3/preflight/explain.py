"""A rule of the table in full, for `--explain`: why it is there, and a configuration on either side of it."""

from __future__ import annotations

import difflib
from dataclasses import asdict

from roll_r3.config.report import MAX_FINDINGS, MORE
from roll_r3.config.rules.table import Example, Row
from roll_r3.preflight.rules import ALL_RULES
from roll_r3.preflight.rules.table import Pretend, SurroundingsRule
from roll_r3.strategies.base import Capabilities
from roll_r3.strategies.registry import STRATEGIES

_LOADING = {
    "file": "the file cannot be read, or is no configuration",
    "override": "an override is not of the form section.field=value, or names what cannot be set",
    "yaml": "the text is not plain YAML",
    "yaml-tag": "a YAML tag asks for something to be constructed; only plain values are read",
    "duplicate-key": "a key is given twice; YAML would keep the last without a word",
    "interpolation": "a ${section.field} cannot be resolved, or asks for something else than a field",
    "unknown-field": "there is no such field",
    "missing-field": "a field without a default is not given",
    "bad-value": "a value is not of the field's type, or out of its bounds",
    MORE: f"more than {MAX_FINDINGS} findings of a kind are not listed one by one",
    "dialect-unclear": "the file has keys of ROLL and of roll_r3, and its meaning depends on which of the two it is "
    "for; write `dialect: roll` or `dialect: roll_r3` at its top",
    "roll-pipeline": "a file of another pipeline of ROLL's; roll_r3 runs RLVR alone",
    "roll-include": "an include that only ROLL could read, and what needs it; paste its content in its place",
    "roll-defaults": "what a file that was written for ROLL leaves out, where ROLL's defaults are not roll_r3's",
    "roll-translated": "a key of ROLL that roll_r3 writes in another way; it was translated",
    "roll-unread": "a key of ROLL without which nothing changes here",
    "roll-unsupported": "a key of ROLL that roll_r3 does not support",
}
"""Findings that are not rows of the table: they come from reading the file."""


def explain_rule(rule_id: str) -> str | None:
    """A page about one rule; None when there is no such rule."""
    said = _LOADING.get(rule_id)
    if said is not None:
        return f"{rule_id}\n\n{said}."
    row = next((row for row in ALL_RULES if row.id == rule_id), None)
    return None if row is None else _page(row)


def similar_rules(rule_id: str) -> list[str]:
    """Ids that may have been meant."""
    return difflib.get_close_matches(rule_id, rule_ids(), n=3, cutoff=0.4)


def rule_ids() -> list[str]:
    """Every id that a finding may have."""
    return [*_LOADING, *(row.id for row in ALL_RULES)]


def _page(row: Row) -> str:
    wrong, right = shown_examples(row)
    return "\n".join(
        [
            f"{row.id} ({row.severities})",
            "",
            f"Why: {row.why}.",
            f"Fix: {row.fix}.",
            "Fields:",
            *(f"  {field}" for field in row.fields),
            "",
            "On top of the smallest configuration (docs/compatibility.md shows it), this is reported:",
            *(f"  {line}" for line in wrong),
            "and this is not:",
            *(f"  {line}" for line in right),
        ]
    )


def shown_examples(row: Row) -> tuple[list[str], list[str]]:
    """The two examples of a row as lines for people: overrides, and how the surroundings differ."""
    if isinstance(row, SurroundingsRule):
        return [*_lines(row.wrong), *_pretended(row.wrong_where)], [*_lines(row.right), *_pretended(row.right_where)]
    return _lines(row.wrong), _lines(row.right)


def _lines(example: Example) -> list[str]:
    return list(example) or ["(as it is)"]


def _pretended(where: Pretend) -> list[str]:
    installed = [f"({package} {version or 'not'} installed)" for package, version in where.versions.items()]
    said = [f"(if its config.json said {name}: {value})" for name, value in where.config_json.items()]
    rows = [f"(if {problem})" for problem in where.domain_problems]
    return [*installed, *said, *rows, *(_declared(name, able) for name, able in where.capabilities.items())]


def _declared(name: str, able: Capabilities) -> str:
    """How a strategy would differ from what it is."""
    real = asdict(STRATEGIES[name].capabilities)
    changes = [f"{key}: {_short(value)}" for key, value in asdict(able).items() if value != real[key]]
    return f"(if {name} declared {', '.join(changes)})"


def _short(value: object) -> str:
    return " and ".join(sorted(value)) or "none" if isinstance(value, frozenset) else str(value).lower()
