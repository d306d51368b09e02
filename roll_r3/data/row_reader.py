"""Rows of the data with their configured values, exactly as in the files."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

from roll_r3.config.workers import BUNDLED_DOMAIN, DataArgs
from roll_r3.data import columns
from roll_r3.data.columns import Message
from roll_r3.data.faults import DataError, Faults, Place, quoted
from roll_r3.data.json_files import Numbered, json_rows, jsonl_rows
from roll_r3.data.json_text import plain
from roll_r3.data.parquet import parquet_rows
from roll_r3.data.sources import BUNDLED, ReadLimit, files_of, format_of, names_of, stem_of
from roll_r3.data.tiny_task import BUNDLED_TASKS

logger = logging.getLogger(__name__)
T = TypeVar("T")

VALIDATION_LIMIT = ReadLimit(rows=20_000, size=64 << 20)
"""Rows and bytes read in validation at the beginning of the files, all together."""
_FILE_MINIMUM = ReadLimit(rows=100, size=1 << 20)
"""Rows and bytes read in validation of each file at least."""


@dataclass(frozen=True)
class Row:
    """Row with its configured values."""

    place: Place
    messages: tuple[Message, ...]
    ground_truth: str
    domain: str
    id: str
    columns: dict[str, Any]
    """All columns of the file, as plain JSON values."""


def read_rows(args: DataArgs, faults: Faults) -> Iterator[Row]:
    """Yield all valid rows of all files.

    Args:
        faults: receives the faults of the other rows and files.
    """
    for file in files_of(names_of(args.file_name), faults):
        yield from _rows_of(file, args, faults, None)


def validate_rows(args: DataArgs, faults: Faults) -> None:
    """Validate a part of the data within seconds; `faults` receives the faults.

    Reads `VALIDATION_LIMIT` at the beginning of the files and some rows at the end.
    """
    files = list(files_of([name for name in names_of(args.file_name) if name], faults))  # a rule reports empty names
    parts = max(len(files), 1)
    limit = ReadLimit(
        max(_FILE_MINIMUM.rows, VALIDATION_LIMIT.rows // parts), max(_FILE_MINIMUM.size, VALIDATION_LIMIT.size // parts)
    )
    for file in files:
        for _ in _rows_of(file, args, faults, limit):
            pass


def _rows_of(file: str, args: DataArgs, faults: Faults, limit: ReadLimit | None) -> Iterator[Row]:
    if file.startswith(BUNDLED):
        yield from _bundled(file, args.domain)
        return
    unit = "line" if ".jsonl" in format_of(file) else "row"
    left_out: list[str] = []
    count = 0
    try:
        for number, found in _numbered(file, args, limit, left_out):
            place = Place(file, number, unit)
            if (row := _row(found, place, f"{stem_of(file)}-{count}", args, faults, left_out)) is not None:
                yield row
            count += 1
    except DataError as error:
        faults.add_file(file, error)
        return
    if left_out and limit is None:
        logger.warning("%s: reward rules do not receive columns without a JSON form: %s", file, quoted(left_out))


def _numbered(file: str, args: DataArgs, limit: ReadLimit | None, left_out: list[str]) -> Iterator[Numbered]:
    kind = format_of(file)
    if kind == ".parquet":
        named = [name for name in (args.messages or args.prompt, args.ground_truth, args.domain, args.id) if name]
        return parquet_rows(file, named, limit, left_out)
    return json_rows(file, limit) if kind == ".json" else jsonl_rows(file, limit)


def _row(
    found: dict[str, Any] | DataError,
    place: Place,
    default_id: str,
    args: DataArgs,
    faults: Faults,
    left_out: list[str],
) -> Row | None:
    """Return the row; None if it has a fault, which `faults` receives."""
    if isinstance(found, DataError):
        faults.add_row(place, found)
        return None
    sound = True

    def kept(read: Callable[..., T], *arguments: Any) -> T | None:
        nonlocal sound
        try:
            return read(found, *arguments)
        except DataError as error:
            faults.add_row(place, error)
            sound = False
            return None

    messages = kept(columns.messages_of, args.messages) if args.messages else kept(columns.prompt_of, args.prompt)
    truth = kept(columns.label_of, args.ground_truth, "ground_truth")
    domain = kept(columns.label_of, args.domain, "domain") if args.domain else "default"
    name = kept(columns.name_of, args.id) if args.id else default_id
    every = kept(_plain, left_out)
    if not sound or messages is None or truth is None or domain is None or name is None or every is None:
        return None
    return Row(place, tuple(messages), truth, domain, name, every)


def _plain(found: dict[str, Any], left_out: list[str]) -> dict[str, Any]:
    return {name: plain(value) for name, value in found.items() if name not in left_out}


def _bundled(name: str, domain: str | None) -> Iterator[Row]:
    task = name.removeprefix(BUNDLED)
    for i, (prompt, answer) in enumerate(BUNDLED_TASKS[task]()):
        yield Row(
            Place(name, i + 1),
            ({"role": "user", "content": prompt},),
            answer,
            task if domain == BUNDLED_DOMAIN else "default",
            f"{stem_of(name)}-{i}",
            {"prompt": prompt, "ground_truth": answer},
        )
