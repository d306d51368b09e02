"""Faults of data: what is wrong with a value, a row or a file, and all of it as one message."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field

from roll_r3.config.readable import printable

_SHOWN = 60
"""Characters of a value that are shown."""
_NAMED = 5
"""Rows of one kind of fault that are named."""
_MOST = 20
"""Kinds of faults that are told one by one."""


class Refused(Exception):
    """A value, a row or a file that cannot be kept as it is.

    Args:
        kind: rows of a file with the same kind are told as one.
        said: the value and why it cannot be kept; printable.
        advice: what to write instead.
    """

    def __init__(self, kind: str, said: str, advice: str) -> None:
        super().__init__(said)
        self.kind, self.said, self.advice = kind, said, advice


def empty() -> Refused:
    """The fault of a file without rows."""
    return Refused("empty", "it is empty", "name a file with rows")


def shown(value: object) -> str:
    """A value of a row as JSON, escaped and cut."""
    if isinstance(value, str):
        value = value[: _SHOWN + 1]  # a text of megabytes is not copied for a few of its letters
    text = printable(json.dumps(value, ensure_ascii=False, default=str)[: 2 * _SHOWN])
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."


def quoted(names: object) -> str:
    """Names of columns, the first few."""
    listed = [shown(name) for name in names] if isinstance(names, list | tuple | dict) else [shown(names)]
    rest = len(listed) - 2 * _NAMED
    return ", ".join(listed[: 2 * _NAMED]) + (f" and {rest} more" if rest > 0 else "")


@dataclass(frozen=True)
class Place:
    """A row of a file."""

    file: str
    number: int
    """From 1; negative: from the end of the file, whose last row is -1."""
    unit: str = "row"
    """Unit of the number: "line" for JSON Lines, else "row"."""

    def __str__(self) -> str:
        return f"{self.unit} {self.number}" if self.number > 0 else f"{self.unit} {-self.number} from the end"


@dataclass
class _Kind:
    file: str
    first: Refused
    rows: int = 0
    places: list[Place] = field(default_factory=list)

    def __str__(self) -> str:
        at = f" {self.places[0]}" if self.places else ""
        text = f"{printable(self.file)}{at}: {self.first.said}. Instead, {self.first.advice}"
        if self.rows < 2:
            return text
        unit, numbers = self.places[0].unit, [place for place in self.places if place.number > 0]
        if len(numbers) == len(self.places):
            named = f"{unit}s {', '.join(str(place.number) for place in numbers)}"
        else:
            named = ", ".join(map(str, self.places))
        return f"{text} ({self.rows} rows: {named}{', ...' if self.rows > len(self.places) else ''})"


class Faults:
    """Faults of the files of one role, counted by file and kind."""

    def __init__(self) -> None:
        self._kinds: dict[tuple[str, str], _Kind] = {}

    def __bool__(self) -> bool:
        return bool(self._kinds)

    def __len__(self) -> int:
        return len(self._kinds)

    def of_file(self, file: str, refused: Refused) -> None:
        """Note what is wrong with a file as a whole."""
        self._kinds.setdefault((file, refused.kind), _Kind(file, refused))

    def of_row(self, place: Place, refused: Refused) -> None:
        """Note what is wrong with a row."""
        kind = self._kinds.setdefault((place.file, refused.kind), _Kind(place.file, refused))
        kind.rows += 1
        if len(kind.places) < _NAMED:
            kind.places.append(place)

    def lines(self) -> Iterator[str]:
        """One line for each file and kind, in the order in which they were found."""
        kinds = list(self._kinds.values())
        yield from map(str, kinds[:_MOST])
        if rest := kinds[_MOST:]:
            yield f"and {len(rest)} more kinds of faults in {len({kind.file for kind in rest})} files"
