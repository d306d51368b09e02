"""Fields of the models by dotted path: their types, their names, and suggestions for unknown names."""

from __future__ import annotations

import difflib
import types
import typing
from collections.abc import Iterator
from typing import Any

from pydantic import BaseModel

from roll_r3.config.findings.report import show_value
from roll_r3.config.pipeline import RLVRConfig
from roll_r3.config.tree import join

TAG = "strategy_name"
"""Field to choose among several sections, and type of pydantic's error about an unknown name."""
REPLACED = {
    "rollout_correction.mode": "write rollout_correction.is_weight: token in place of token_tis, and leave out disable",
    "rollout_correction.cap": "write rollout_correction.is_cap",
}
"""Field of earlier versions -> its replacement."""
_LISTED, _NEAR = 40, 3
"""Number of names listed in full, and of the nearest names shown of a longer list."""
_SIMILAR = 0.75
"""Similarity of a name to a field to suggest it: `sead` for seed, but not `sft_train` for actor_train."""


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


def kinds_at(path: str, data: Any = None) -> list[Any]:
    """Return the alternative types of a dotted path; `data` as in `annotations_at`."""
    return [kind for annotation in annotations_at(path, data) for kind in members(annotation)]


def _is_meant(annotation: Any, node: Any) -> bool:
    """Return false for a section with another strategy name than `node`."""
    if not is_section(annotation) or TAG not in annotation.model_fields:
        return True
    field = annotation.model_fields[TAG]
    named = node.get(TAG, field.default) if isinstance(node, dict) else field.default
    return named in typing.get_args(field.annotation)


def fields_at(path: str, data: Any = None) -> list[str]:
    """Return the fields of the section at a dotted path, in order; empty for an unknown section."""
    sections = [m for annotation in annotations_at(path, data) for m in members(annotation) if is_section(m)]
    return list(dict.fromkeys(name for section in sections for name in section.model_fields))


def null_is_a_value(path: str, data: Any = None) -> bool:
    """Return true if null at a dotted path differs from leaving the field out."""
    parent, _, name = path.rpartition(".")
    sections = [kind for kind in kinds_at(parent, data) if is_section(kind) and name in kind.model_fields]
    fields = [section.model_fields[name] for section in sections]
    return any(types.NoneType in members(field.annotation) and field.default is not None for field in fields)


def example_at(path: str) -> str:
    """Return a valid number for `path`."""
    parent, _, name = path.rpartition(".")
    sections = [kind for kind in kinds_at(parent) if is_section(kind) and name in kind.model_fields]
    defaults = [section.model_fields[name].default for section in sections]
    number = next((d for d in defaults if isinstance(d, int | float) and not isinstance(d, bool)), None)
    return show_value(number if number is not None else 1 if int in kinds_at(path) else 0.5)


def did_you_mean(path: str, data: dict[str, Any]) -> str:
    """Return a fix for an unknown field: its replacement, a similar name, or the names of its section."""
    if path in REPLACED:
        return REPLACED[path]
    parent, _, name = path.rpartition(".")
    here = fields_at(parent, data)
    if close := difflib.get_close_matches(name, here, n=1, cutoff=_SIMILAR):
        return f"did you mean {join(parent, close[0])}?"
    by_name: dict[str, list[str]] = {}
    for field in _all_fields(""):
        by_name.setdefault(field.rpartition(".")[2], []).append(field)
    if close := difflib.get_close_matches(name, by_name, n=1, cutoff=0.8):
        return f"did you mean {' or '.join(by_name[close[0]][:3])}?"
    if len(here) > _LISTED:
        near = difflib.get_close_matches(name, here, n=_NEAR, cutoff=0.0)
        return f"the nearest names here: {', '.join(near)}; all fields are in docs/configuration.md"
    return f"fields here: {', '.join(here)}"


def _all_fields(path: str) -> Iterator[str]:
    for name in fields_at(path):
        yield join(path, name)
        yield from _all_fields(join(path, name))
