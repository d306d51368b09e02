"""Untyped configuration: nested dicts and lists of plain values, with functions to walk and change it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

Keys = tuple[str | int, ...]
"""Path of a value: keys of sections and indices of lists, outermost first."""


def dotted(keys: Keys) -> str:
    """Return `keys` as a dotted path."""
    return ".".join(map(str, keys))


def join(path: str, key: str) -> str:
    """Return the dotted path of `key` below `path`."""
    return f"{path}.{key}" if path else key


def children(node: Any) -> Iterator[tuple[str | int, Any]]:
    """Yield (key or index, value) of a section or list; nothing for a plain value."""
    if isinstance(node, dict):
        yield from node.items()
    elif isinstance(node, list):
        yield from enumerate(node)


def paths_below(node: Any, keys: Keys = ()) -> Iterator[Keys]:
    """Yield the keys of every value inside `node`, which is at `keys`."""
    for key, value in children(node):
        yield (*keys, key)
        yield from paths_below(value, (*keys, key))


def holds(node: Any, key: str | int) -> bool:
    """Return true if a section or list has a value at `key`."""
    return (
        key in node if isinstance(node, dict) else isinstance(key, int) and isinstance(node, list) and key < len(node)
    )


def is_at(node: Any, keys: Keys) -> bool:
    """Return true if there is a value at `keys`."""
    for key in keys:
        if not holds(node, key):
            return False
        node = node[key]
    return True


def unshared(node: Any) -> Any:
    """Return a copy without shared sections or lists, as made by aliases: each can be changed alone."""
    if isinstance(node, dict):
        return {key: unshared(value) for key, value in node.items()}
    return [unshared(value) for value in node] if isinstance(node, list) else node


def at(node: Any, keys: Keys) -> Any:
    """Return the value at `keys`."""
    for key in keys:
        node = node[key]
    return node


def remove(node: dict[str, Any], keys: Keys) -> None:
    """Remove the value at `keys`; for an item of a list, remove the whole list, since items have no names."""
    named = max(i for i, key in enumerate(keys) if not isinstance(key, int))
    at(node, keys[:named]).pop(keys[named], None)


def overlap(path: str, other: str) -> bool:
    """Return true if two dotted paths name the same value, or one a value inside the other; `*` is any key."""
    pairs = zip(path.split("."), other.split("."), strict=False)
    return all("*" in (one, two) or one == two for one, two in pairs)
