"""One override of the command line, `a.b.c=value`, on a configuration that is not typed yet."""

from __future__ import annotations

from typing import Any

from roll_r3.config.explain import did_you_mean, fields_at, null_is_a_value
from roll_r3.config.report import Finding, show_value
from roll_r3.config.roll_yaml import is_key_of_rolls
from roll_r3.config.tree import at, join, leads_somewhere
from roll_r3.config.yaml_file import MAX_DEPTH, MAX_PATH, is_writable, parse_yaml

_NULLS = ("null", "Null", "NULL", "~")
"""Values that take a key away. Empty text is none of them: it may come from a variable that the shell does not have."""


def apply(override: str, data: dict[str, Any], places: dict[str, str]) -> list[Finding]:
    """Set one `a.b.c=value` in `data`, or take the key away where the value is null, and note its place in `places`.

    Returns:
        What is wrong with the override.
    """
    path, equals, text = override.partition("=")
    keys = path.split(".")
    if not equals or not all(keys) or any(c.isspace() for c in path) or len(keys) > MAX_DEPTH or len(path) > MAX_PATH:
        fix = "write section.field=value, without spaces around ="
        return [Finding("override", "error", (), f"{show_value(override)!r} is not an override", fix)]
    if not is_writable(override):
        why = f"{show_value(override)!r} is not UTF-8"
        return [Finding("override", "error", (), why, "write it on a terminal whose encoding is UTF-8")]
    place = f"override {show_value(override)}"
    if text.strip() in _NULLS and not null_is_a_value(path, data):
        return _take_away(keys, data, places, override)
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
    for replaced in [p for p in places if p == path or p.startswith(f"{path}.")]:
        del places[replaced]
    places.update(dict.fromkeys([path, *parsed.places], place))
    return []


def _take_away(keys: list[str], data: dict[str, Any], places: dict[str, str], override: str) -> list[Finding]:
    """Take the key out of `data` that `keys` lead to; returns what is wrong with that."""
    node: Any = data
    for depth, key in enumerate(keys):
        here = ".".join(keys[:depth])
        if isinstance(node, list) or (node is not None and not isinstance(node, dict)):
            if problem := _cannot_set(node, key, here, override):
                return [problem]
            why = f"{show_value(override)!r}: {here} is a list, and its items cannot be taken away one by one"
            return [Finding("override", "error", ((here, node),), why, f"set the whole list: {here}=[...]")]
        if node is None or key not in node:
            return _nothing_to_take_away(keys, data, override)
        if depth < len(keys) - 1:
            node = node[key]
    del node[keys[-1]]
    path = ".".join(keys)
    for gone in [p for p in places if p == path or p.startswith(f"{path}.")]:
        del places[gone]
    return []


def _nothing_to_take_away(keys: list[str], data: dict[str, Any], override: str) -> list[Finding]:
    """Findings about a key that the file does not have: none, unless no file could have it."""
    path, parent = ".".join(keys), ".".join(keys[:-1])
    if keys[-1] in fields_at(parent, data) or is_key_of_rolls(path):
        return []
    why = f"{show_value(override)!r}: there is no {show_value(path)} to take away"
    beside = at(data, tuple(keys[:-1])) if leads_somewhere(data, tuple(keys[:-1])) else None
    named = not fields_at(parent, data) and isinstance(beside, dict)
    fix = f"{parent} has: {', '.join(map(str, beside))}" if named and beside else did_you_mean(path, data)
    return [Finding("override", "error", (), why, fix)]


def _cannot_set(node: Any, key: str, here: str, override: str) -> Finding | None:
    """Reason against setting `key` in `node`, the value at `here`; None: there is none."""
    if isinstance(node, dict):
        return None
    if not isinstance(node, list):
        why = f"{show_value(override)!r}: {here} holds a value, it is not a section, so nothing can be set inside it"
        return Finding("override", "error", ((here, node),), why, f"set {here} itself")
    if key.isdecimal() and len(key) <= len(str(len(node))) and int(key) < len(node):
        return None
    why = (
        f"{show_value(override)!r}: {here} is a list of {len(node)} items and {show_value(key)} is none of them (they "
        "count from 0)"
    )
    return Finding("override", "error", ((here, node),), why, f"set the whole list: {here}=[...]")
