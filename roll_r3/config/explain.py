"""Pydantic's errors in the words of the YAML: dotted path, value, what is wrong, and what was probably meant."""

from __future__ import annotations

import difflib
import math
import types
import typing
from collections.abc import Iterator
from typing import Any

from pydantic import BaseModel, ValidationError

from roll_r3.config.pipeline import RLVRConfig
from roll_r3.config.report import ABSENT, Finding
from roll_r3.config.tree import Keys, children, dotted, join

MAX_INTEGER = 2**63 - 1
"""Larger numbers are slips of the finger, and no engine could hold them."""
_TAG = "strategy_name"
"""Field by which a section is one of several, and the type of the error that it names none of them."""
_RULE_IDS = {"extra_forbidden": "unknown-field", "missing": "missing-field", _TAG: _TAG}


def explain(error: ValidationError, data: dict[str, Any]) -> list[tuple[Keys, Finding]]:
    """One finding per field of `data` that was refused, however many members of a union refused it, and its keys.

    Of a strategy that there is not, the keys are its whole section: no other strategy could read its settings.
    """
    whys: dict[tuple[Keys, str], list[str]] = {}
    values: dict[Keys, object] = {}
    for detail in error.errors(include_url=False, include_context=False):
        kind = detail["type"]
        keys, value = _locate(detail["loc"], data, is_missing=kind == "missing")
        values[keys] = value
        whys.setdefault((keys, _RULE_IDS.get(kind, "bad-value")), []).append(_why(kind, detail["msg"]))
    return [(keys, _finding(keys, values[keys], rule, messages, data)) for (keys, rule), messages in whys.items()]


def _finding(keys: Keys, value: Any, rule: str, messages: list[str], data: dict[str, Any]) -> Finding:
    if rule == _TAG:
        keys, rule, value = (*keys, _TAG), "bad-value", value[_TAG]
    path = dotted(keys)
    fix = _did_you_mean(path, data) if rule == "unknown-field" else ""
    return Finding(rule, "error", ((path, value),), why=", or ".join(dict.fromkeys(messages)), fix=fix)


def misread_values(data: dict[str, Any]) -> list[tuple[Keys, Finding]]:
    """Values that pydantic would take without a word and nobody means: yes or no for a number, infinity."""
    return list(_misread(data, ()))


def _misread(node: Any, keys: Keys) -> Iterator[tuple[Keys, Finding]]:
    path = dotted(keys)
    if isinstance(node, float) and not math.isfinite(node):
        yield keys, Finding("bad-value", "error", ((path, node),), "should be a finite number")
    elif isinstance(node, bool):
        kinds = {kind for annotation in annotations_at(path) for kind in members(annotation)}
        if kinds & {int, float} and bool not in kinds:
            why = f"YAML reads {'on, yes and true' if node else 'off, no and false'} as a boolean; this is a number"
            yield keys, Finding("bad-value", "error", ((path, node),), why, "write the number")
    elif isinstance(node, int) and abs(node) > MAX_INTEGER:
        yield keys, Finding("bad-value", "error", ((path, node),), f"should be a number up to {MAX_INTEGER}")
    for key, value in children(node):
        yield from _misread(value, (*keys, key))


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
        node = dict(children(node)).get(key) if node is not None else None
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
    return dict(children(node)).get(_TAG, field.default) in typing.get_args(field.annotation)


def fields_at(path: str, data: Any = None) -> list[str]:
    """The fields of the section at a dotted path, in their order; empty when there is no such section."""
    sections = [m for annotation in annotations_at(path, data) for m in members(annotation) if is_section(m)]
    return list(dict.fromkeys(name for section in sections for name in section.model_fields))


def _locate(loc: tuple[int | str, ...], data: Any, *, is_missing: bool) -> tuple[Keys, object]:
    """The keys that a user knows, and the value, of pydantic's `loc` (which names union members as well)."""
    keys: Keys = ()
    node: Any = data
    for key in loc:
        if (isinstance(node, dict) and key in node) or (isinstance(node, list) and isinstance(key, int)):
            node = typing.cast(Any, node)[key]
            keys = (*keys, key)  # any other key names a member of a union, or what is missing
    return ((*keys, loc[-1]), ABSENT) if is_missing else (keys, node)


def _why(kind: str, message: str) -> str:
    if kind == "extra_forbidden":
        return "there is no such field"
    if kind == "missing":
        return "this field must be given"
    if kind in ("model_type", "dict_type"):
        return "should be a section of `field: value` lines"
    return message.removeprefix("Value error, ").replace("Input should", "should").replace("a valid tuple", "a list")


def _did_you_mean(path: str, data: dict[str, Any]) -> str:
    """What was probably meant by an unknown field: a similar name beside it, or such a name in another section."""
    parent, _, name = path.rpartition(".")
    here = fields_at(parent, data)
    if close := difflib.get_close_matches(name, here, n=1):
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
