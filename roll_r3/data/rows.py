"""Rows of the data with the values that a configuration names: as they are in the files, or refused."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

from roll_r3.config.workers import DataArgs
from roll_r3.data import columns
from roll_r3.data.columns import Message
from roll_r3.data.faults import Faults, Place, Refused, quoted
from roll_r3.data.json_files import Numbered, json_rows, jsonl_rows
from roll_r3.data.json_text import plain
from roll_r3.data.parquet import parquet_rows
from roll_r3.data.sources import BUNDLED, Look, files_of, format_of, names_of, stem_of
from roll_r3.data.tiny_task import BUNDLED_TASKS

logger = logging.getLogger(__name__)
T = TypeVar("T")

LOOK = Look(rows=20_000, size=64 << 20)
"""Part that a look reads at the beginning of the files, all together."""
_LEAST = Look(rows=100, size=1 << 20)
"""Part that it reads of each file in any case."""


@dataclass(frozen=True)
class Row:
    """One row with what the configuration names in it."""

    place: Place
    messages: tuple[Message, ...]
    ground_truth: str
    domain: str
    id: str
    columns: dict[str, Any]
    """All of the file's, as plain values of JSON."""


def read_rows(args: DataArgs, faults: Faults) -> Iterator[Row]:
    """All rows of all files that can be kept as they are.

    Args:
        faults: is given everything else.
    """
    for file in files_of(names_of(args.file_name), faults):
        yield from _rows_of(file, args, faults, None)


def look_at_rows(args: DataArgs, faults: Faults) -> None:
    """Read as much as seconds allow, and give `faults` what cannot be kept: what `LOOK` says of
    the beginning, and some at the end."""
    files = list(files_of([name for name in names_of(args.file_name) if name], faults))  # of no name a rule says so
    parts = max(len(files), 1)
    look = Look(max(_LEAST.rows, LOOK.rows // parts), max(_LEAST.size, LOOK.size // parts))
    for file in files:
        for _ in _rows_of(file, args, faults, look):
            pass


def _rows_of(file: str, args: DataArgs, faults: Faults, look: Look | None) -> Iterator[Row]:
    if file.startswith(BUNDLED):
        yield from _bundled(file)
        return
    unit = "line" if ".jsonl" in format_of(file) else "row"
    left_out: list[str] = []
    count = 0
    try:
        for number, found in _numbered(file, args, look, left_out):
            place = Place(file, number, unit)
            if (row := _row(found, place, f"{stem_of(file)}-{count}", args, faults, left_out)) is not None:
                yield row
            count += 1
    except Refused as refused:
        faults.of_file(file, refused)
        return
    if left_out and look is None:
        logger.warning("%s: reward rules do not get columns that JSON has no form for: %s", file, quoted(left_out))


def _numbered(file: str, args: DataArgs, look: Look | None, left_out: list[str]) -> Iterator[Numbered]:
    kind = format_of(file)
    if kind == ".parquet":
        named = [name for name in (args.messages or args.prompt, args.ground_truth, args.domain, args.id) if name]
        return parquet_rows(file, named, look, left_out)
    return json_rows(file, look) if kind == ".json" else jsonl_rows(file, look)


def _row(
    found: dict[str, Any] | Refused, place: Place, default_id: str, args: DataArgs, faults: Faults, left_out: list[str]
) -> Row | None:
    """The row; None where `faults` was given at least one."""
    if isinstance(found, Refused):
        faults.of_row(place, found)
        return None
    sound = True

    def kept(read: Callable[..., T], *arguments: Any) -> T | None:
        nonlocal sound
        try:
            return read(found, *arguments)
        except Refused as refused:
            faults.of_row(place, refused)
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


def _bundled(name: str) -> Iterator[Row]:
    for i, (prompt, answer) in enumerate(BUNDLED_TASKS[name.removeprefix(BUNDLED)]()):
        yield Row(
            Place(name, i + 1),
            ({"role": "user", "content": prompt},),
            answer,
            "default",
            f"{stem_of(name)}-{i}",
            {"prompt": prompt, "ground_truth": answer},
        )
