"""A configuration before it is typed: nested dicts and lists of plain values, and ways to walk and change it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

Keys = tuple[str | int, ...]
"""The way to a value: keys of sections and indices of lists, outermost first."""


def dotted(keys: Keys) -> str:
    """`keys` as a user writes them."""
    return ".".join(map(str, keys))


def join(path: str, key: str) -> str:
    """`key` below the dotted `path`."""
    return f"{path}.{key}" if path else key


def children(node: Any) -> Iterator[tuple[str | int, Any]]:
    """(key or index, value) of a section or list; nothing for a plain value."""
    if isinstance(node, dict):
        yield from node.items()
    elif isinstance(node, list):
        yield from enumerate(node)


def paths_below(node: Any, keys: Keys = ()) -> Iterator[Keys]:
    """The keys of every value inside `node`, which `keys` lead to."""
    for key, value in children(node):
        yield (*keys, key)
        yield from paths_below(value, (*keys, key))


def holds(node: Any, key: str | int) -> bool:
    """Whether there is a value under `key` of a section or list."""
    return (
        key in node if isinstance(node, dict) else isinstance(key, int) and isinstance(node, list) and key < len(node)
    )


def leads_somewhere(node: Any, keys: Keys) -> bool:
    """Return true if there is still a value where `keys` lead."""
    for key in keys:
        if not holds(node, key):
            return False
        node = node[key]
    return True


def unshared(node: Any) -> Any:
    """A copy in which no section or list stands at two places, as those of an alias do: each can be changed alone."""
    if isinstance(node, dict):
        return {key: unshared(value) for key, value in node.items()}
    return [unshared(value) for value in node] if isinstance(node, list) else node


def at(node: Any, keys: Keys) -> Any:
    """The value that `keys` lead to."""
    for key in keys:
        node = node[key]
    return node


def remove(node: dict[str, Any], keys: Keys) -> None:
    """Take out the value that `keys` lead to; of a list the whole is taken out, since its items have no names."""
    named = max(i for i, key in enumerate(keys) if not isinstance(key, int))
    at(node, keys[:named]).pop(keys[named], None)


def overlap(path: str, other: str) -> bool:
    """Whether two dotted paths name the same value, or one of them something inside the other; `*` is any key."""
    pairs = zip(path.split("."), other.split("."), strict=False)
    return all("*" in (one, two) or one == two for one, two in pairs)
