"""Errors in data files: of a value, a row or a file, collected into one message."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field

from roll_r3.config.findings.readable import printable

_MAX_CHARS = 60
"""Maximum number of characters of a shown value."""
_MAX_ROWS = 5
"""Maximum number of named rows per kind of fault."""
_MAX_KINDS = 20
"""Maximum number of kinds of faults with a line of their own."""


class DataError(Exception):
    """Value, row or file that cannot be used unchanged.

    Args:
        kind: rows of a file with the same kind share a line.
        problem: the value and the reason; printable.
        advice: the correction to make.
    """

    def __init__(self, kind: str, problem: str, advice: str) -> None:
        super().__init__(problem)
        self.kind, self.problem, self.advice = kind, problem, advice


def empty() -> DataError:
    """Return the error for a file without rows."""
    return DataError("empty", "it is empty", "name a file with rows")


def shown(value: object) -> str:
    """Format a value of a row as JSON, escaped and truncated."""
    if isinstance(value, str):
        value = value[: _MAX_CHARS + 1]  # avoids a copy of megabytes for a few letters
    text = printable(json.dumps(value, ensure_ascii=False, default=str)[: 2 * _MAX_CHARS])
    return text if len(text) <= _MAX_CHARS else f"{text[:_MAX_CHARS]}..."


def quoted(names: object) -> str:
    """Format the first few column names."""
    listed = [shown(name) for name in names] if isinstance(names, list | tuple | dict) else [shown(names)]
    rest = len(listed) - 2 * _MAX_ROWS
    return ", ".join(listed[: 2 * _MAX_ROWS]) + (f" and {rest} more" if rest > 0 else "")


@dataclass(frozen=True)
class Place:
    """Position of a row in a file."""

    file: str
    number: int
    """From 1; negative: from the end of the file, the last row being -1."""
    unit: str = "row"
    """Unit of the number: "line" for JSON Lines, else "row"."""

    def __str__(self) -> str:
        return f"{self.unit} {self.number}" if self.number > 0 else f"{self.unit} {-self.number} from the end"


@dataclass
class _Kind:
    file: str
    first: DataError
    rows: int = 0
    places: list[Place] = field(default_factory=list)

    def __str__(self) -> str:
        at = f" {self.places[0]}" if self.places else ""
        text = f"{printable(self.file)}{at}: {self.first.problem}. Instead, {self.first.advice}"
        if self.rows < 2:
            return text
        unit, numbers = self.places[0].unit, [place for place in self.places if place.number > 0]
        if len(numbers) == len(self.places):
            named = f"{unit}s {', '.join(str(place.number) for place in numbers)}"
        else:
            named = ", ".join(map(str, self.places))
        return f"{text} ({self.rows} rows: {named}{', ...' if self.rows > len(self.places) else ''})"


class Faults:
    """Faults of all files, counted by file and kind."""

    def __init__(self) -> None:
        self._kinds: dict[tuple[str, str], _Kind] = {}

    def __bool__(self) -> bool:
        return bool(self._kinds)

    def __len__(self) -> int:
        return len(self._kinds)

    def add_file(self, file: str, error: DataError) -> None:
        """Record a fault of a whole file."""
        self._kinds.setdefault((file, error.kind), _Kind(file, error))

    def add_row(self, place: Place, error: DataError) -> None:
        """Record a fault of a row."""
        kind = self._kinds.setdefault((place.file, error.kind), _Kind(place.file, error))
        kind.rows += 1
        if len(kind.places) < _MAX_ROWS:
            kind.places.append(place)

    def lines(self) -> Iterator[str]:
        """Yield one line per file and kind, in order of discovery."""
        kinds = list(self._kinds.values())
        yield from map(str, kinds[:_MAX_KINDS])
        if rest := kinds[_MAX_KINDS:]:
            yield f"and {len(rest)} more kinds of faults in {len({kind.file for kind in rest})} files"
