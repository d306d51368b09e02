"""Findings from pydantic's errors: dotted path, value, reason, and a fix."""

from __future__ import annotations

import difflib
import math
import re
import types
import typing
from collections.abc import Iterator
from typing import Any, Literal

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from roll_r3.config.pipeline import RLVRConfig
from roll_r3.config.report import ABSENT, MAX_FINDINGS, Finding, show_value
from roll_r3.config.tree import Keys, children, dotted, holds, join

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
_TAG = "strategy_name"
"""Field to choose among several sections, and type of the error for an unknown name."""
_SIMILAR = 0.75
"""Similarity of a name to a field to suggest it: `sead` for seed, but not `sft_train` for actor_train."""
_RULE_IDS = {"extra_forbidden": "unknown-field", "missing": "missing-field", _TAG: _TAG}


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
    if rule == _TAG:
        keys, rule, value = (*keys, _TAG), "bad-value", value[_TAG]
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


def _fix(path: str, value: object, details: list[ErrorDetails], data: dict[str, Any]) -> str:
    """Return a fix for `value`; empty if the reason includes it."""
    kinds = {detail["type"] for detail in details}
    if "extra_forbidden" in kinds:
        return did_you_mean(path, data)
    if "missing" in kinds:
        return f"give it in the file, or as an override {path}=..."
    if kinds & {"literal_error", _TAG}:
        choices = [c for kind in _kinds(path) if typing.get_origin(kind) is Literal for c in typing.get_args(kind)]
        return f"write {'one of ' * (len(choices) > 1)}{', '.join(map(str, choices))}"
    if kinds & _SECTIONS:
        fields = fields_at(path, data)
        return f"its fields: {', '.join(fields)}" if fields else "write `name: value` lines below it"
    if kinds <= _NUMBERS:
        return f"write a number, for example {_example(path)}"
    if kinds == {"string_type"} and isinstance(value, int | float):
        return f'write it in quotes, as in "{show_value(value)}"'
    if "string_pattern_mismatch" in kinds:
        return f"write a name such as {re.sub('[^A-Za-z0-9._-]+', '-', str(value)).strip('._-') or 'my-run'}"
    nouns = list(dict.fromkeys(_NOUNS[detail["type"]] for detail in details if detail["type"] in _NOUNS))
    return f"write {' or '.join(nouns)}" if nouns else ""


def _example(path: str) -> str:
    """Return a valid number for `path`."""
    parent, _, name = path.rpartition(".")
    sections = [kind for kind in _kinds(parent) if is_section(kind) and name in kind.model_fields]
    defaults = [section.model_fields[name].default for section in sections]
    number = next((d for d in defaults if isinstance(d, int | float) and not isinstance(d, bool)), None)
    return show_value(number if number is not None else 1 if int in _kinds(path) else 0.5)


def _kinds(path: str, data: Any = None) -> list[Any]:
    """Return the alternative types of a dotted path; `data` as in `annotations_at`."""
    return [kind for annotation in annotations_at(path, data) for kind in members(annotation)]


def misread_values(data: dict[str, Any]) -> list[tuple[Keys, Finding]]:
    """Return values accepted by pydantic but never meant: yes or no for a number, infinity, huge integers."""
    return list(_misread(data, (), data))


def _misread(node: Any, keys: Keys, data: dict[str, Any]) -> Iterator[tuple[Keys, Finding]]:
    path, why = dotted(keys), ""
    if isinstance(node, float) and not math.isfinite(node):
        why = "must be a finite number"
    elif isinstance(node, bool):
        kinds = set(_kinds(path, data))
        if kinds & {int, float} and bool not in kinds:
            why = f"must be a number: YAML reads {'on, yes and true' if node else 'off, no and false'} as a boolean"
    elif isinstance(node, int) and abs(node) > MAX_INTEGER:
        why = f"must be a number up to {MAX_INTEGER}"
    if why:
        fix = f"write a number, for example {_example(path)}"
        yield keys, Finding("bad-value", "error", ((path, node),), why, fix)
    for key, value in children(node):
        yield from _misread(value, (*keys, key), data)


def members(annotation: Any) -> list[Any]:
    """Return the alternatives of an annotation: `PositiveInt | None` is [int, NoneType]."""
    origin = typing.get_origin(annotation)
    if origin is typing.Annotated:
        return members(typing.get_args(annotation)[0])
    if origin in (typing.Union, types.UnionType):
        return [member for part in typing.get_args(annotation) for member in members(part)]
    return [annotation]


def is_section(annotation: Any) -> typing.TypeGuard[type[BaseModel]]:
    """Return true if an annotation without alternatives is a configuration model."""
    return isinstance(annotation, type) and issubclass(annotation, BaseModel)


def annotations_at(path: str, data: Any = None) -> list[Any]:
    """Return the possible annotations of the field at a dotted path; empty for an unknown field.

    Among sections with a strategy name, only the one named in `data` counts; None: all count.
    """
    found: list[Any] = [RLVRConfig]
    node = data
    for key in path.split(".") if path else ():
        above, found = [m for a in found for m in members(a) if node is None or _is_meant(m, node)], []
        node = node.get(key) if isinstance(node, dict) else None
        for annotation in above:
            origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
            if is_section(annotation) and key in annotation.model_fields:
                found.append(annotation.model_fields[key].annotation)
            elif origin is dict:
                found.append(arguments[1])
            elif origin is tuple:
                found.append(arguments[0])
    return found


def _is_meant(annotation: Any, node: Any) -> bool:
    """Return false for a section with another strategy name than `node`."""
    if not is_section(annotation) or _TAG not in annotation.model_fields:
        return True
    field = annotation.model_fields[_TAG]
    named = node.get(_TAG, field.default) if isinstance(node, dict) else field.default
    return named in typing.get_args(field.annotation)


def null_is_a_value(path: str, data: Any = None) -> bool:
    """Return true if null at a dotted path differs from leaving the field out."""
    parent, _, name = path.rpartition(".")
    sections = [kind for kind in _kinds(parent, data) if is_section(kind) and name in kind.model_fields]
    fields = [section.model_fields[name] for section in sections]
    return any(types.NoneType in members(field.annotation) and field.default is not None for field in fields)


def fields_at(path: str, data: Any = None) -> list[str]:
    """Return the fields of the section at a dotted path, in order; empty for an unknown section."""
    sections = [m for annotation in annotations_at(path, data) for m in members(annotation) if is_section(m)]
    return list(dict.fromkeys(name for section in sections for name in section.model_fields))


def _locate(loc: tuple[int | str, ...], data: Any, *, is_missing: bool) -> tuple[Keys, object]:
    """Return keys and value of pydantic's `loc`, without the names of union members in it."""
    keys: Keys = ()
    node: Any = data
    for key in loc:
        if holds(node, key):
            node = node[key]
            keys = (*keys, key)  # other keys are union members, or missing fields
    return ((*keys, loc[-1]), ABSENT) if is_missing else (keys, node)


def did_you_mean(path: str, data: dict[str, Any]) -> str:
    """Return a fix for an unknown field: a similar name here or in another section, or all names of its section."""
    parent, _, name = path.rpartition(".")
    here = fields_at(parent, data)
    if close := difflib.get_close_matches(name, here, n=1, cutoff=_SIMILAR):
        return f"did you mean {join(parent, close[0])}?"
    by_name: dict[str, list[str]] = {}
    for field in _all_fields(""):
        by_name.setdefault(field.rpartition(".")[2], []).append(field)
    if close := difflib.get_close_matches(name, by_name, n=1, cutoff=0.8):
        return f"did you mean {' or '.join(by_name[close[0]][:3])}?"
    return f"fields here: {', '.join(here)}"


def _all_fields(path: str) -> Iterator[str]:
    for name in fields_at(path):
        yield join(path, name)
        yield from _all_fields(join(path, name))
