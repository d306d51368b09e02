"""`${a.b}` in a value stands for the value of another field.

Resolvers of OmegaConf, such as `${oc.env:HOME}`, are rejected: the file and the overrides alone decide what runs.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from roll_r3.config.findings.report import Finding
from roll_r3.config.tree import Keys, at, children, dotted, join, paths_below

MAX_CHARACTERS = 1 << 20
"""Limit of what all references of a configuration read, in characters; each value counts for `_VALUE` more."""
_VALUE = 100
_MAX_DEPTH = 100
"""Sections and references around a value."""
_REFERENCE = re.compile(r"\$\{\.*[\w-]+(?:\.[\w-]+|\[[\w-]+\])*\}")


def resolve(data: dict[str, Any], places: dict[str, str]) -> tuple[dict[str, Any], list[tuple[Keys, Finding]]]:
    """Return a copy of `data` with every reference replaced by the value of its field.

    A reference without a value becomes None, with an error in the second result; so does a reference to it. `places`
    gains the origin of each value.
    """
    found: list[tuple[Keys, Finding]] = []
    resolved: dict[str, Any] = _References(data).resolve((), found)
    for keys, text in _texts(data, ()):
        if "${" in text:
            _note_origin(dotted(keys), text, at(resolved, keys), places)
    return resolved, found


class _UnresolvedError(Exception):
    """A reference without a value; the text gives the reason."""


class _References:
    """References of one tree. The work for all of them together is bounded by `MAX_CHARACTERS`."""

    def __init__(self, data: dict[str, Any]) -> None:
        self._data = data
        self._room = MAX_CHARACTERS

    def resolve(self, keys: Keys, found: list[tuple[Keys, Finding]]) -> Any:
        """Return a resolved copy of the value at `keys`. Appends to `found` what has no value."""
        value = at(self._data, keys)
        if isinstance(value, dict):
            return {key: self.resolve((*keys, key), found) for key in value}
        if isinstance(value, list):
            return [self.resolve((*keys, index), found) for index in range(len(value))]
        if not isinstance(value, str):
            return value
        finding = _rejected(dotted(keys), value)
        if finding is None:
            try:
                return self._value(keys, len(keys)) if "${" in value else value
            except _UnresolvedError as error:
                finding = _unresolved(dotted(keys), value, str(error))
        found.append((keys, finding))
        return None

    def _value(self, keys: Keys, depth: int) -> Any:
        """Return a resolved copy of the value at `keys`. Raises _UnresolvedError."""
        value = at(self._data, keys)
        self._spend(len(value) if isinstance(value, str) else 0, depth)
        if isinstance(value, dict):
            return {key: self._value((*keys, key), depth + 1) for key in value}
        if isinstance(value, list):
            return [self._value((*keys, index), depth + 1) for index in range(len(value))]
        if not isinstance(value, str):
            return value
        if finding := _rejected(dotted(keys), value):
            raise _UnresolvedError(finding.why)
        if _REFERENCE.fullmatch(value):
            return self._value(self._place(keys, value, depth), depth + 1)
        text = _REFERENCE.sub(lambda match: self._text(keys, match[0], depth), value)
        if "${" in text:
            raise _UnresolvedError("its parts make another reference")
        return text

    def _text(self, keys: Keys, reference: str, depth: int) -> str:
        value = self._value(self._place(keys, reference, depth), depth + 1)
        if isinstance(value, dict | list):
            raise _UnresolvedError(f"{reference} is a section or a list, not a part of a text")
        return str(value)

    def _place(self, keys: Keys, reference: str, depth: int) -> Keys:
        """Return the keys of the value meant by `reference`, as written at `keys`. Raises _UnresolvedError."""
        path = reference[2:-1]
        dots = len(path) - len(path.lstrip("."))
        if dots > len(keys):
            raise _UnresolvedError(f"{reference} leads out of the file")
        place = keys[: len(keys) - dots] if dots else ()
        for name in re.findall(r"[\w-]+", path):
            node = at(self._data, place)
            while isinstance(node, str) and _REFERENCE.fullmatch(node):  # a section taken from elsewhere
                depth += 1
                self._spend(0, depth)
                place = self._place(place, node, depth)
                node = at(self._data, place)
            if isinstance(node, list) and re.fullmatch(r"-?\d{1,9}", name) and -len(node) <= int(name) < len(node):
                place = (*place, int(name) % len(node))
            elif isinstance(node, dict) and name in node:
                place = (*place, name)
            else:
                raise _UnresolvedError(f"{reference} is not found")
        return place

    def _spend(self, characters: int, depth: int) -> None:
        self._room -= characters + _VALUE
        if depth > _MAX_DEPTH:
            raise _UnresolvedError(f"it leads to itself, or through more than {_MAX_DEPTH} sections and references")
        if self._room < 0:
            raise _UnresolvedError(f"all references together read more than {MAX_CHARACTERS:,} characters")


def _unresolved(path: str, text: str, reason: str) -> Finding:
    fix = "write the full dotted path of another field, or a relative one as in ${..field}"
    return Finding("interpolation", "error", ((path, text),), f"this cannot be resolved: {reason}", fix)


def _rejected(path: str, text: str) -> Finding | None:
    """Return a finding about `???`, and about `${...}` in another form than a reference."""
    if text == "???":
        fix = f"give it in the file, or as an override {path}=..."
        return Finding("missing-field", "error", ((path, text),), "this value is still to be filled in", fix)
    if "${" in _REFERENCE.sub("", text) or "\\${" in text:
        why = (
            "only ${section.field} is resolved: environment variables and other resolvers are not, so that the file "
            "and the overrides alone decide what runs"
        )
        fix = f'write the value, or let the shell fill it in: "{path}=$VARIABLE" as an override'
        return Finding("interpolation", "error", ((path, text),), why, fix)
    return None


def _note_origin(path: str, text: str, value: Any, places: dict[str, str]) -> None:
    """Add to `places` the origin of the value at `path` and of all values below it."""
    source = text[2:-1] if _REFERENCE.fullmatch(text) else ""
    origin = f"{places.get(path, '')}, from {text}" + (f" at {places[source]}" if source in places else "")
    for inner in (path, *(join(path, dotted(keys)) for keys in paths_below(value))):
        places[inner] = origin


def _texts(node: Any, keys: Keys) -> Iterator[tuple[Keys, str]]:
    """Yield (keys, text) of every text in a tree of plain values."""
    if isinstance(node, str):
        yield keys, node
    for key, value in children(node):
        yield from _texts(value, (*keys, key))
