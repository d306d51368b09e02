"""Findings from pydantic's errors: dotted path, value, reason, and a fix."""

from __future__ import annotations

import math
import re
import typing
from collections.abc import Iterator
from typing import Any, Literal

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from roll_r3.config.findings.report import ABSENT, MAX_FINDINGS, Finding, show_value
from roll_r3.config.reading.field_paths import TAG, did_you_mean, example_at, fields_at, kinds_at
from roll_r3.config.secrets import is_hidden
from roll_r3.config.tree import Keys, children, dotted, holds

MAX_INTEGER = 2**63 - 1
"""Largest integer: larger ones are typing mistakes, and overflow in engines."""
_NOUNS = {
    "int_type": "an integer",
    "int_parsing": "an integer",
    "int_from_float": "an integer",
    "float_type": "a number",
    "float_parsing": "a number",
    "bool_type": "true or false",
    "bool_parsing": "true or false",
    "string_type": "text",
    "tuple_type": "a list, as in [a, b]",
    "model_type": "a section of `field: value` lines",
    "dict_type": "a section of `field: value` lines",
}
_SECTIONS = {"model_type", "dict_type"}
_LIMITS = {"greater_than", "greater_than_equal", "less_than", "less_than_equal"}
_NUMBERS = _LIMITS | {"int_type", "int_parsing", "int_from_float", "float_type", "float_parsing"}
PATTERNS = {
    r"^[A-Za-z0-9][A-Za-z0-9._-]*$": "must hold letters, digits, dots, underscores and hyphens alone, and begin with "
    "a letter or a digit"
}
"""Pattern in the schema -> its description."""
_RULE_IDS = {"extra_forbidden": "unknown-field", "missing": "missing-field", TAG: TAG}


def explain(error: ValidationError, data: dict[str, Any]) -> list[tuple[Keys, Finding]]:
    """Return the keys of each rejected field of `data`, and one finding about it for all members of a union.

    Only listed findings (see `limited`) get a fix, since finding one takes a millisecond or more. For an unknown
    strategy, the keys are those of its section: no other strategy could read the settings.
    """
    problems: dict[tuple[Keys, str], list[ErrorDetails]] = {}
    values: dict[Keys, object] = {}
    for detail in error.errors(include_url=False):
        kind = detail["type"]
        keys, value = _locate(detail["loc"], data, is_missing=kind == "missing")
        values[keys] = value
        problems.setdefault((keys, _RULE_IDS.get(kind, "bad-value")), []).append(detail)
    return [
        (keys, _finding(keys, values[keys], rule, details, data if number < MAX_FINDINGS else None))
        for number, ((keys, rule), details) in enumerate(problems.items())
    ]


def _finding(keys: Keys, value: Any, rule: str, details: list[ErrorDetails], data: dict[str, Any] | None) -> Finding:
    if rule == TAG:
        keys, rule, value = (*keys, TAG), "bad-value", value[TAG]
    path = dotted(keys)
    why = ", or ".join(dict.fromkeys(map(_why, details)))
    return Finding(rule, "error", ((path, value),), why, "" if data is None else _fix(path, value, details, data))


def _why(detail: ErrorDetails) -> str:
    kind, message = detail["type"], detail["msg"]
    if kind == "extra_forbidden":
        return "there is no such field"
    if kind == "missing":
        return "this field must be given"
    if noun := _NOUNS.get(kind):
        return f"must be {noun}"
    if kind == "string_pattern_mismatch":
        return PATTERNS[detail["ctx"]["pattern"]]
    return message.removeprefix("Value error, ").replace("Input should", "must").replace("String should", "must")


_RECIPES = {
    "gspo": "GSPO is importance_sampling: seq with loss_agg_mode: seq-mean-token-mean (docs/which_loss.md)",
    "drgrpo": "Dr. GRPO is grpo with norm_adv_by_std_in_grpo: false (docs/which_loss.md)",
    "dapo": "DAPO is grpo with pg_clip_high: 0.28 and filter_groups (docs/which_loss.md)",
    "icepop": "IcePop is rollout_correction: {is_weight: token, is_floor: 0.5, is_cap: 5} (docs/which_loss.md)",
}
"""Name of a recipe, small letters alone -> its settings; for a value that names no estimator or loss."""


def _fix(path: str, value: object, details: list[ErrorDetails], data: dict[str, Any]) -> str:
    """Return a fix for `value`; empty if the reason includes it."""
    kinds = {detail["type"] for detail in details}
    if "extra_forbidden" in kinds:
        return did_you_mean(path, data)
    if "missing" in kinds:
        return f"give it in the file, or as an override {path}=..."
    if kinds & {"literal_error", TAG}:
        literals = [kind for kind in kinds_at(path) if typing.get_origin(kind) is Literal]
        choices = list(dict.fromkeys(str(choice) for kind in literals for choice in typing.get_args(kind)))
        known = _RECIPES.get(re.sub("[^a-z]", "", str(value).lower()), "")
        return f"write {'one of ' * (len(choices) > 1)}{', '.join(choices)}{known and f'; {known}'}"
    if kinds & _SECTIONS:
        fields = fields_at(path, data)
        return f"its fields: {', '.join(fields)}" if fields else "write `name: value` lines below it"
    if kinds <= _NUMBERS:
        return f"write a number, for example {example_at(path)}"
    if kinds == {"string_type"} and isinstance(value, int | float):
        return "write it in quotes" if is_hidden(path) else f'write it in quotes, as in "{show_value(value)}"'
    if "string_pattern_mismatch" in kinds:
        return f"write a name such as {re.sub('[^A-Za-z0-9._-]+', '-', str(value)).strip('._-') or 'my-run'}"
    nouns = list(dict.fromkeys(_NOUNS[detail["type"]] for detail in details if detail["type"] in _NOUNS))
    return f"write {' or '.join(nouns)}" if nouns else ""


def misread_values(data: dict[str, Any]) -> list[tuple[Keys, Finding]]:
    """Return values accepted by pydantic but never meant: yes or no for a number, infinity, huge integers."""
    return list(_misread(data, (), data))


def _misread(node: Any, keys: Keys, data: dict[str, Any]) -> Iterator[tuple[Keys, Finding]]:
    path, why = dotted(keys), ""
    if isinstance(node, float) and not math.isfinite(node):
        why = "must be a finite number"
    elif isinstance(node, bool):
        kinds = set(kinds_at(path, data))
        if kinds & {int, float} and bool not in kinds:
            why = f"must be a number: YAML reads {'on, yes and true' if node else 'off, no and false'} as a boolean"
    elif isinstance(node, int) and abs(node) > MAX_INTEGER:
        why = f"must be a number up to {MAX_INTEGER}"
    if why:
        fix = f"write a number, for example {example_at(path)}"
        yield keys, Finding("bad-value", "error", ((path, node),), why, fix)
    for key, value in children(node):
        yield from _misread(value, (*keys, key), data)


def _locate(loc: tuple[int | str, ...], data: Any, *, is_missing: bool) -> tuple[Keys, object]:
    """Return keys and value of pydantic's `loc`, without the names of union members in it."""
    keys: Keys = ()
    node: Any = data
    for key in loc:
        if holds(node, key):
            node = node[key]
            keys = (*keys, key)  # other keys are union members, or missing fields
    return ((*keys, loc[-1]), ABSENT) if is_missing else (keys, node)
