"""How large an interpolated value becomes, before it is made: references that double each other grow without bound."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from roll_r3.config.tree import Keys, at, children

MAX_VALUES = 10_000
MAX_CHARACTERS = 1 << 20
MAX_REFERENCES = 1000
"""What all interpolations of one configuration may come to, as OmegaConf, which needs most of a millisecond for some
references, is to be done within a second."""
MAX_CHAIN = 32
"""References that lead to one another."""

REFERENCE = re.compile(r"\$\{\.*[\w-]+(?:\.[\w-]+|\[[\w-]+\])*\}")


@dataclass(frozen=True)
class Size:
    """What a value, or several, become once everything in them is filled in."""

    nodes: int = 0
    characters: int = 0
    references: int = 0
    chain: int = 0
    """The longest way over references."""

    def __add__(self, other: Size) -> Size:
        return Size(
            self.nodes + other.nodes,
            self.characters + other.characters,
            self.references + other.references,
            max(self.chain, other.chain),
        )

    def excess(self) -> str:
        """What there is too much of; empty when nothing is."""
        if self.chain > MAX_CHAIN:
            return f"more than {MAX_CHAIN} references lead to one another"
        if self.nodes > MAX_VALUES:
            return f"it grows to more than {MAX_VALUES} values"
        if self.characters > MAX_CHARACTERS:
            return f"it grows to more than {MAX_CHARACTERS} characters"
        return f"it takes more than {MAX_REFERENCES} references" if self.references > MAX_REFERENCES else ""


class EndlessError(Exception):
    """A value that contains itself, or a chain of references that is too long to follow; the text says which."""


class Sizes:
    """The sizes of the values of one tree. Each is worked out once, so that the tree's own size is the work."""

    def __init__(self, data: dict[str, Any]) -> None:
        self._data = data
        self._known: dict[Keys, Size | str] = {}
        """A text: why there is no size."""
        self._open: list[Keys] = []
        """Texts that are being worked out, the outermost first."""

    def of(self, keys: Keys) -> Size:
        """The size of the value at `keys`. Raises EndlessError."""
        self._open.clear()
        try:
            return self._of(keys)
        except RecursionError as error:
            raise EndlessError("its references lead too deep") from error

    def _of(self, keys: Keys) -> Size:
        known = self._known.get(keys)
        if known is None:
            try:
                known = self._work_out(keys)
            except EndlessError as error:
                known = str(error)
            self._known[keys] = known
        if isinstance(known, str):
            raise EndlessError(known)
        return known

    def _work_out(self, keys: Keys) -> Size:
        value = at(self._data, keys)
        if isinstance(value, str):
            return self._of_text(keys, value)
        size = Size(1, 0 if isinstance(value, dict | list) else len(str(value)))
        for key, _ in children(value):
            size += Size(characters=len(str(key))) + self._of((*keys, key))
        return size

    def _of_text(self, keys: Keys, text: str) -> Size:
        size = Size(1, len(text))
        with self._inside(keys):
            for reference in REFERENCE.findall(text):
                place, hops = self._follow(keys, reference)
                target = Size() if place is None else self._of(place)
                size += hops + target + Size(references=1, chain=max(hops.chain, target.chain) + 1)
        return size

    def _follow(self, keys: Keys, reference: str) -> tuple[Keys | None, Size]:
        """Where `reference`, written at `keys`, leads (None: nowhere), and what it takes to get there."""
        path = reference[2:-1]
        names = re.findall(r"[\w-]+", path)
        dots = len(path) - len(path.lstrip("."))
        if dots > len(keys):
            return None, Size()
        place: Keys = keys[:-dots] if dots else ()
        hops = Size()
        for i, name in enumerate(names):
            found = self._child(place, name)
            if found is None:
                return None, hops
            place = found
            value = at(self._data, place)
            if i < len(names) - 1 and isinstance(value, str) and REFERENCE.fullmatch(value):
                with self._inside(place):
                    inner, more = self._follow(place, value)
                hops += more + Size(references=1, chain=more.chain + 1)
                if inner is None:
                    return None, hops
                place = inner
        return place, hops

    def _child(self, place: Keys, name: str) -> Keys | None:
        node = at(self._data, place)
        if isinstance(node, dict):
            return (*place, name) if name in node else None
        if (
            not isinstance(node, list)
            or not re.fullmatch(r"-?\d{1,9}", name)
            or not -len(node) <= int(name) < len(node)
        ):
            return None
        return (*place, int(name) % len(node))

    @contextmanager
    def _inside(self, keys: Keys) -> Iterator[None]:
        """While the text at `keys` is worked out."""
        if keys in self._open:
            raise EndlessError("Recursive: it contains itself")
        if len(self._open) > MAX_CHAIN:
            raise EndlessError(Size(chain=MAX_CHAIN + 1).excess())
        self._open.append(keys)
        try:
            yield
        finally:
            self._open.pop()
