"""`${a.b}` in a value stands for the value of another field. OmegaConf resolves it; this module is its only user.

Resolvers of OmegaConf, such as `${oc.env:HOME}`, are rejected: the file and the overrides alone decide what runs.

Values are resolved one after the other. A value still waiting is "missing" (`???`) in OmegaConf's tree, so OmegaConf
never follows a chain of references, and the size of the tree can be checked after every step.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from roll_r3.config.findings.report import Finding, show_value
from roll_r3.config.tree import Keys, at, children, dotted, join, paths_below, unshared

MAX_CHARACTERS = 1 << 20
"""Limit of a configuration with its references resolved, in characters; each value counts for `_VALUE` more, and each
reference for its own length, `_PARSING` times."""
_VALUE = 100
_MAX_TEXT = 1 << 14
"""Limit of one text with references, in characters."""
_MAX_PASSES = 20
"""Limit of passes over the waiting values, in alternating order; a file in any sensible order needs one or two."""
_PARSING = 10
"""Weight of a reference in `MAX_CHARACTERS`: OmegaConf parses slowly."""
_MISSING = "???"
_REFERENCE = re.compile(r"\$\{\.*[\w-]+(?:\.[\w-]+|\[[\w-]+\])*\}")


def resolve(data: dict[str, Any], places: dict[str, str]) -> tuple[dict[str, Any], list[tuple[Keys, Finding]]]:
    """Return a copy of `data` with every reference replaced by the value of its field.

    A reference without a value becomes None, with an error in the second result; so does a reference to it. `places`
    gains the origin of each value.
    """
    resolved: dict[str, Any] = unshared(data)
    found: list[tuple[Keys, Finding]] = []
    waiting: dict[Keys, str] = {}
    texts = dict(_texts(data, ()))
    short = {text for text in texts.values() if len(text) <= _MAX_TEXT}  # an alias repeats a text many times
    other_forms = {text for text in short if _other_form(text)}
    for keys, text in texts.items():
        if "${" in text and len(text) > _MAX_TEXT:
            reason = f"a text with references has at most {_MAX_TEXT:,} characters, got {len(text):,}"
            found.append((keys, _unresolved(dotted(keys), text, reason)))
            at(resolved, keys[:-1])[keys[-1]] = None
        elif finding := _rejected(dotted(keys), text, text in other_forms):
            found.append((keys, finding))
            at(resolved, keys[:-1])[keys[-1]] = None
        elif "${" in text:
            waiting[keys] = text
    if waiting:
        for keys, reason in _References(resolved, waiting).resolve():
            found.append((keys, _unresolved(dotted(keys), waiting[keys], reason)))
        for keys, text in waiting.items():
            _note_origin(dotted(keys), text, at(resolved, keys), places)
    return resolved, found


class _UnresolvedError(Exception):
    """A reference without a value; the text gives the reason."""


class _WaitingError(Exception):
    """A reference to a value not resolved yet, or to none at all."""


class _References:
    """References of one tree, resolved in place."""

    def __init__(self, data: dict[str, Any], waiting: dict[Keys, str]) -> None:
        """
        Args:
            data: plain values; changed by `resolve`.
            waiting: keys -> text of every value with a reference.
        """
        from omegaconf import OmegaConf  # noqa: PLC0415  slow to import, and most files have no reference

        self._data, self._waiting = data, dict(waiting)
        for keys in waiting:
            at(data, keys[:-1])[keys[-1]] = _MISSING
        self._tree = OmegaConf.create(data)
        self._room = MAX_CHARACTERS - _size(data)

    def resolve(self) -> Iterator[tuple[Keys, str]]:
        """Resolve all values. Yields (keys, reason) for each without a value; it becomes None."""
        reasons: dict[Keys, str] = {}
        for number in range(_MAX_PASSES):
            order = list(self._waiting.items())
            for keys, text in order if number % 2 == 0 else reversed(order):
                try:
                    value = self._value(keys, text)
                except _WaitingError as error:
                    reasons[keys] = str(error)
                    continue
                except _UnresolvedError as error:
                    yield keys, str(error)
                    value = None
                self._set(keys, value)
            if len(self._waiting) == len(order):
                break
        for keys in list(self._waiting):
            yield keys, reasons[keys]
            self._set(keys, None)

    def _set(self, keys: Keys, value: Any) -> None:
        for tree in (self._data, self._tree):
            at(tree, keys[:-1])[keys[-1]] = value
        del self._waiting[keys]

    def _value(self, keys: Keys, text: str) -> Any:
        """Return the value of a text. Raises _UnresolvedError, or _WaitingError."""
        self._spend(len(text))
        values = {reference: self._read(keys, reference) for reference in set(_REFERENCE.findall(text))}
        if _REFERENCE.fullmatch(text):
            value = values[text]
            self._spend(_size(value))
            return value
        for reference, value in values.items():
            if isinstance(value, dict | list):
                raise _UnresolvedError(f"{show_value(reference)} is a section or a list, not a part of a text")
        self._spend(sum(len(str(values[reference])) for reference in _REFERENCE.findall(text)))
        value = _REFERENCE.sub(lambda match: str(values[match[0]]), text)
        if "${" in value:
            raise _UnresolvedError("its parts make another reference")
        return value

    def _read(self, keys: Keys, reference: str) -> Any:
        """Return the value of one reference as written at `keys`. Raises _UnresolvedError, or _WaitingError."""
        from omegaconf import OmegaConf, errors  # noqa: PLC0415  as above

        self._spend(_PARSING * len(reference))
        section = at(self._tree, keys[:-1])
        section[keys[-1]] = reference
        try:
            value = section[keys[-1]]
            return (
                OmegaConf.to_container(value, resolve=True, throw_on_missing=True)
                if OmegaConf.is_config(value)
                else value
            )
        except (errors.InterpolationToMissingValueError, errors.MissingMandatoryValue) as error:
            raise _WaitingError(f"{show_value(reference)} leads to itself, or through too many references") from error
        except errors.InterpolationKeyError as error:
            raise _WaitingError(f"{show_value(reference)} is not found") from error
        except (errors.InterpolationResolutionError, RecursionError) as error:
            raise _UnresolvedError(f"{show_value(reference)} leads to itself") from error
        finally:
            section[keys[-1]] = _MISSING

    def _spend(self, characters: int) -> None:
        self._room -= characters
        if self._room < 0:
            raise _UnresolvedError(f"with its references the configuration has more than {MAX_CHARACTERS:,} characters")


def _size(node: Any) -> int:
    """Return the size of a tree in characters, with `_VALUE` for each value."""
    own = len(node) if isinstance(node, str) else 0
    return _VALUE + own + sum(_size(value) for _, value in children(node))


def _unresolved(path: str, text: str, reason: str) -> Finding:
    fix = "write the full dotted path of another field, or a relative one as in ${..field}"
    return Finding("interpolation", "error", ((path, text),), f"this cannot be resolved: {reason}", fix)


def _other_form(text: str) -> bool:
    """Return true if a text has `${...}` in another form than a reference."""
    return "${" in _REFERENCE.sub("", text) or "\\${" in text


def _rejected(path: str, text: str, other_form: bool) -> Finding | None:
    """Return a finding about `???`, and about a text with `${...}` in another form than a reference."""
    if text == "???":
        fix = f"give it in the file, or as an override {path}=..."
        return Finding("missing-field", "error", ((path, text),), "this value is still to be filled in", fix)
    if other_form:
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
    origin = f"{places.get(path, '')}, from {show_value(text)}" + (f" at {places[source]}" if source in places else "")
    for inner in (path, *(join(path, dotted(keys)) for keys in paths_below(value))):
        places[inner] = origin


def _texts(node: Any, keys: Keys) -> Iterator[tuple[Keys, str]]:
    """Yield (keys, text) of every text in a tree of plain values."""
    if isinstance(node, str):
        yield keys, node
    for key, value in children(node):
        yield from _texts(value, (*keys, key))
