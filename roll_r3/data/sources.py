"""Sources of rows: what a name in `file_name` stands for."""

from __future__ import annotations

import glob
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from roll_r3.config.disk import NOTHING, is_file, why_no_file
from roll_r3.data.faults import Faults, Refused
from roll_r3.data.tiny_task import BUNDLED_TASKS

BUNDLED = "bundled:"
FORMATS = (".jsonl", ".jsonl.gz", ".json", ".parquet")
_WANTED = f"name a {', '.join(FORMATS)} file that can be read, a pattern like data/*.jsonl, or {BUNDLED}TASK"
_MAGIC = frozenset("*?[")


class Look(NamedTuple):
    """The part of a file that is read before a run starts, for seconds."""

    rows: int
    size: int
    """Bytes."""


def names_of(file_name: str | Sequence[str]) -> Sequence[str]:
    """The names that a configuration gives."""
    return (file_name,) if isinstance(file_name, str) else file_name


def files_of(names: Sequence[str], faults: Faults) -> Iterator[str]:
    """Every source by itself: bundled tasks, files, and the files that each pattern matches, sorted.

    A file that is there under a name with `*`, `?` or `[` is that file. What cannot be a source goes to `faults`.
    """
    for name in names:
        found = [name]
        if not name.startswith(BUNDLED) and _MAGIC & set(name) and not is_file(Path(name)):
            found = _matches(name)
            if not found:
                faults.of_file(name, Refused("nothing", "no file matches this pattern", _WANTED))
        for file in found:
            if refused := _source_fault(file):
                faults.of_file(file, refused)
            else:
                yield file


def format_of(file: str) -> str:
    """The suffix of a file, one of `FORMATS`; empty for any other."""
    return next((suffix for suffix in FORMATS if file.endswith(suffix)), "")


def stem_of(file: str) -> str:
    """The name of a source without its directory and its suffix."""
    return Path(file.removeprefix(BUNDLED)).name.removesuffix(format_of(file))


def _matches(pattern: str) -> list[str]:
    try:
        return sorted(glob.glob(pattern, recursive=True))
    except (OSError, ValueError):  # a name that no file can have
        return []


def _source_fault(file: str) -> Refused | None:
    if file.startswith(BUNDLED):
        if file.removeprefix(BUNDLED) in BUNDLED_TASKS:
            return None
        known = ", ".join(BUNDLED + task for task in sorted(BUNDLED_TASKS))
        return Refused("nothing", "no such bundled task", f"there are {known}")
    if not format_of(file):
        return Refused("format", "not a file of a known format", _WANTED)
    if why := why_no_file(Path(file)):
        said = f"cannot be read, {why}" if why != NOTHING else why
        return Refused("nothing", said, _WANTED)
    return None
