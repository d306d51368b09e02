"""Sources of rows: files, patterns and bundled tasks named by `file_name`."""

from __future__ import annotations

import glob
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from roll_r3.config.reading.disk import MISSING, is_file, why_no_file
from roll_r3.data.faults import DataError, Faults
from roll_r3.data.tiny_task import BUNDLED_TASKS

BUNDLED = "bundled:"
FORMATS = (".jsonl", ".jsonl.gz", ".json", ".parquet")
_WANTED = f"name a readable {', '.join(FORMATS)} file, a pattern like data/*.jsonl, or {BUNDLED}TASK"
_MAGIC = frozenset("*?[")


class ReadLimit(NamedTuple):
    """Limit on the part of a file read in validation."""

    rows: int
    size: int
    """Bytes."""


def names_of(file_name: str | Sequence[str]) -> Sequence[str]:
    """Return the configured names."""
    return (file_name,) if isinstance(file_name, str) else file_name


def files_of(names: Sequence[str], faults: Faults) -> Iterator[str]:
    """Yield each source: bundled tasks, files, and the files matching each pattern, sorted.

    An existing file with `*`, `?` or `[` in its name is taken as this file. `faults` receives the names without a
    source.
    """
    for name in names:
        found = [name]
        if not name.startswith(BUNDLED) and _MAGIC & set(name) and not is_file(Path(name)):
            found = _matches(name)
            if not found:
                faults.add_file(name, DataError("nothing", "no file matches this pattern", _WANTED))
        for file in found:
            if error := _source_error(file):
                faults.add_file(file, error)
            else:
                yield file


def format_of(file: str) -> str:
    """Return the suffix of a file if in `FORMATS`, else an empty string."""
    return next((suffix for suffix in FORMATS if file.endswith(suffix)), "")


def stem_of(file: str) -> str:
    """Return the name of a source without directory and suffix."""
    return Path(file.removeprefix(BUNDLED)).name.removesuffix(format_of(file))


def _matches(pattern: str) -> list[str]:
    try:
        return sorted(glob.glob(pattern, recursive=True))
    except (OSError, ValueError):  # an invalid file name
        return []


def _source_error(file: str) -> DataError | None:
    if file.startswith(BUNDLED):
        if file.removeprefix(BUNDLED) in BUNDLED_TASKS:
            return None
        known = ", ".join(BUNDLED + task for task in sorted(BUNDLED_TASKS))
        return DataError("nothing", "no such bundled task", f"there are {known}")
    if not format_of(file):
        return DataError("format", "not a file of a known format", _WANTED)
    if why := why_no_file(Path(file)):
        problem = f"cannot be read, {why}" if why != MISSING else why
        return DataError("nothing", problem, _WANTED)
    return None
