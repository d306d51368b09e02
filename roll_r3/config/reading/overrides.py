"""Overrides of the command line, `a.b.c=value`, on an untyped configuration."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from roll_r3.config.findings.report import Finding, show_value
from roll_r3.config.reading.field_paths import did_you_mean, fields_at, null_is_a_value
from roll_r3.config.reading.yaml_file import MAX_DEPTH, MAX_PATH, is_writable, parse_yaml
from roll_r3.config.secrets import hidden_override
from roll_r3.config.tree import at, is_at, join

_NULLS = ("null", "Null", "NULL", "~")
"""Values to remove a key. Not empty text: it may come from a variable unknown to the shell."""


def apply(
    override: str, data: dict[str, Any], places: dict[str, str], is_other_key: Callable[[str], bool]
) -> list[Finding]:
    """Set one `a.b.c=value` in `data`, or remove the key if the value is null, and note its place in `places`.

    Args:
        is_other_key: returns true for the dotted path of a key of another dialect, which may be removed too.

    Returns:
        Findings about the override.
    """
    path, equals, text = override.partition("=")
    writable, override = is_writable(override), hidden_override(override)
    keys = path.split(".")
    if not equals or not all(keys) or any(c.isspace() for c in path) or len(keys) > MAX_DEPTH or len(path) > MAX_PATH:
        fix = "write section.field=value, without spaces around ="
        return [Finding("override", "error", (), f"{show_value(override)!r} is not an override", fix)]
    if not writable:
        why = f"{show_value(override)!r} is not UTF-8"
        return [Finding("override", "error", (), why, "write it on a terminal with UTF-8 as its encoding")]
    place = f"override {show_value(override)}"
    if text.strip() in _NULLS and not null_is_a_value(path, data):
        return _remove(keys, data, places, override, is_other_key)
    parsed = parse_yaml(text, place, path)
    if parsed.findings:
        return parsed.findings
    *above, last = keys
    node: Any = data
    here = ""
    for key in above:
        if problem := _cannot_set(node, key, here, override):
            return [problem]
        inner = join(here, key)
        if isinstance(node, dict) and node.get(key) is None:
            node[key] = {}
            places[inner] = place
        node, here = node[int(key) if isinstance(node, list) else key], inner
    if problem := _cannot_set(node, last, here, override):
        return [problem]
    node[int(last) if isinstance(node, list) else last] = parsed.value
    _forget(path, places)
    places.update(dict.fromkeys([path, *parsed.places], place))
    return []


def _remove(
    keys: list[str],
    data: dict[str, Any],
    places: dict[str, str],
    override: str,
    is_other_key: Callable[[str], bool],
) -> list[Finding]:
    """Remove the key at `keys` from `data`; return findings against it."""
    node: Any = data
    for depth, key in enumerate(keys):
        here = ".".join(keys[:depth])
        if isinstance(node, list) or (node is not None and not isinstance(node, dict)):
            if problem := _cannot_set(node, key, here, override):
                return [problem]
            why = f"{show_value(override)!r}: {here} is a list, and its items cannot be removed one by one"
            return [Finding("override", "error", ((here, node),), why, f"set the whole list: {here}=[...]")]
        if node is None or key not in node:
            return [] if is_other_key(".".join(keys)) else _missing_key(keys, data, override)
        if depth < len(keys) - 1:
            node = node[key]
    del node[keys[-1]]
    _forget(".".join(keys), places)
    return []


def _forget(path: str, places: dict[str, str]) -> None:
    """Remove the places of `path` and of all paths below it."""
    for place in [p for p in places if p == path or p.startswith(f"{path}.")]:
        del places[place]


def _missing_key(keys: list[str], data: dict[str, Any], override: str) -> list[Finding]:
    """Return findings about the removal of a missing key: none for a valid key."""
    path, parent = ".".join(keys), ".".join(keys[:-1])
    if keys[-1] in fields_at(parent, data):
        return []
    why = f"{show_value(override)!r}: there is no {show_value(path)} to remove"
    siblings = at(data, tuple(keys[:-1])) if is_at(data, tuple(keys[:-1])) else None
    named = not fields_at(parent, data) and isinstance(siblings, dict)
    fix = f"{parent} has: {', '.join(map(str, siblings))}" if named and siblings else did_you_mean(path, data)
    return [Finding("override", "error", (), why, fix)]


def _cannot_set(node: Any, key: str, here: str, override: str) -> Finding | None:
    """Return a finding if `key` cannot be set in `node`, the value at `here`."""
    if isinstance(node, dict):
        return None
    if not isinstance(node, list):
        why = f"{show_value(override)!r}: {here} is a value, not a section, so nothing can be set inside it"
        return Finding("override", "error", ((here, node),), why, f"set {here} itself")
    if key.isdecimal() and len(key) <= len(str(len(node))) and int(key) < len(node):
        return None
    why = (
        f"{show_value(override)!r}: {here} is a list of {len(node)} items, and {show_value(key)} is not an index of it "
        "(counted from 0)"
    )
    return Finding("override", "error", ((here, node),), why, f"set the whole list: {here}=[...]")
