"""Pydantic's errors in the words of the YAML: dotted path, value, what is wrong, and what was probably meant."""

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
"""Larger numbers are slips of the finger, and no engine could hold them."""
_NOUNS = {
    "int_type": "a whole number",
    "int_parsing": "a whole number",
    "int_from_float": "a whole number",
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
    r"^[A-Za-z0-9][A-Za-z0-9._-]*$": "should hold letters, digits, dots, underscores and hyphens alone, and begin with "
    "a letter or a digit"
}
"""A pattern of the schema -> what it allows, in words."""
_TAG = "strategy_name"
"""Field by which a section is one of several, and the type of the error that it names none of them."""
_SIMILAR = 0.75
"""Likeness from which a name is taken for a slip: `sead` for seed, and not `sft_train` for actor_train."""
_RULE_IDS = {"extra_forbidden": "unknown-field", "missing": "missing-field", _TAG: _TAG}


def explain(error: ValidationError, data: dict[str, Any]) -> list[tuple[Keys, Finding]]:
    """One finding per field of `data` that was refused, however many members of a union refused it, and its keys.

    What to write instead is looked for in those alone that are listed, see `limited`: it takes a millisecond or more.

    Of a strategy that there is not, the keys are its whole section: no other strategy could read its settings.
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
        return f"should be {noun}"
    if kind == "string_pattern_mismatch":
        return PATTERNS[detail["ctx"]["pattern"]]
    return message.removeprefix("Value error, ").replace("Input should", "should").replace("String should", "should")


def _fix(path: str, value: object, details: list[ErrorDetails], data: dict[str, Any]) -> str:
    """What to write instead of `value`; empty where the reason says it already."""
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
    """A number that may stand at `path`."""
    parent, _, name = path.rpartition(".")
    sections = [kind for kind in _kinds(parent) if is_section(kind) and name in kind.model_fields]
    defaults = [section.model_fields[name].default for section in sections]
    number = next((d for d in defaults if isinstance(d, int | float) and not isinstance(d, bool)), None)
    return show_value(number if number is not None else 1 if int in _kinds(path) else 0.5)


def _kinds(path: str, data: Any = None) -> list[Any]:
    """The alternatives of what may stand at a dotted path; `data` as in `annotations_at`."""
    return [kind for annotation in annotations_at(path, data) for kind in members(annotation)]


def misread_values(data: dict[str, Any]) -> list[tuple[Keys, Finding]]:
    """Values that pydantic would take without a word and nobody means: yes or no for a number, infinity."""
    return list(_misread(data, (), data))


def _misread(node: Any, keys: Keys, data: dict[str, Any]) -> Iterator[tuple[Keys, Finding]]:
    path = dotted(keys)
    if isinstance(node, float) and not math.isfinite(node):
        fix = f"write a number, for example {_example(path)}"
        yield keys, Finding("bad-value", "error", ((path, node),), "should be a finite number", fix)
    elif isinstance(node, bool):
        kinds = set(_kinds(path, data))
        if kinds & {int, float} and bool not in kinds:
            why = f"YAML reads {'on, yes and true' if node else 'off, no and false'} as a boolean; this is a number"
            yield (
                keys,
                Finding("bad-value", "error", ((path, node),), why, f"write the number, for example {_example(path)}"),
            )
    elif isinstance(node, int) and abs(node) > MAX_INTEGER:
        fix = f"write a number, for example {_example(path)}"
        yield keys, Finding("bad-value", "error", ((path, node),), f"should be a number up to {MAX_INTEGER}", fix)
    for key, value in children(node):
        yield from _misread(value, (*keys, key), data)


def members(annotation: Any) -> list[Any]:
    """The alternatives of an annotation: `PositiveInt | None` is [int, NoneType]."""
    origin = typing.get_origin(annotation)
    if origin is typing.Annotated:
        return members(typing.get_args(annotation)[0])
    if origin in (typing.Union, types.UnionType):
        return [member for part in typing.get_args(annotation) for member in members(part)]
    return [annotation]


def is_section(annotation: Any) -> typing.TypeGuard[type[BaseModel]]:
    """Whether an annotation without alternatives is a configuration model."""
    return isinstance(annotation, type) and issubclass(annotation, BaseModel)


def annotations_at(path: str, data: Any = None) -> list[Any]:
    """The annotations that the field at a dotted path may have; empty when there is no such field.

    Of sections that go by a name, those that `data` does not name are left out; None: all count.
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
    """Whether a section that goes by a name is the one that `node` names."""
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
    """The fields of the section at a dotted path, in their order; empty when there is no such section."""
    sections = [m for annotation in annotations_at(path, data) for m in members(annotation) if is_section(m)]
    return list(dict.fromkeys(name for section in sections for name in section.model_fields))


def _locate(loc: tuple[int | str, ...], data: Any, *, is_missing: bool) -> tuple[Keys, object]:
    """The keys that a user knows, and the value, of pydantic's `loc` (which names union members as well)."""
    keys: Keys = ()
    node: Any = data
    for key in loc:
        if holds(node, key):
            node = node[key]
            keys = (*keys, key)  # any other key names a member of a union, or what is missing
    return ((*keys, loc[-1]), ABSENT) if is_missing else (keys, node)


def did_you_mean(path: str, data: dict[str, Any]) -> str:
    """What was probably meant by an unknown field: a similar name beside it, or such a name in another section."""
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
