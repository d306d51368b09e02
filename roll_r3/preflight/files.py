"""Data files, the output directory and the checkpoint to resume from: whether they can be used."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from roll_r3.config.reading.disk import MISSING, is_directory, why_no_file, why_unknown
from roll_r3.config.workers import DataArgs
from roll_r3.data.faults import Faults
from roll_r3.data.row_reader import validate_rows
from roll_r3.errors import CheckpointError
from roll_r3.saving.manifest import MARKER
from roll_r3.saving.state import read_state
from roll_r3.saving.store import CHECKPOINTS, Store


def data_problems(args: DataArgs) -> Iterator[str]:
    """Yield problems of the prompt sources, as far as a few seconds of reading can find them."""
    faults = Faults()
    validate_rows(args, faults)
    yield from faults.lines()


def output_problem(output_dir: str, exp_name: str) -> str:
    """Return why output_dir/exp_name cannot be written; empty if it can."""
    path = Path(output_dir).absolute() / exp_name
    for folder in (path, *path.parents):
        if why := why_unknown(folder):
            return f"{folder}: {why}"
        if is_directory(folder):
            return "" if os.access(folder, os.W_OK) else f"{folder} is not writable"
        if why_no_file(folder) != MISSING:
            return f"{folder} is not a directory"
    return f"{path} cannot be made"


def resume_problem(name: str) -> str:
    """Return why a run cannot resume from the checkpoint at a path, after a quick look; empty if it can."""
    if name in ("off", "auto"):
        return ""
    path = Path(name)
    if why := why_unknown(path):
        return f"{name}: {why}"
    if not is_directory(path):
        return f"{name} is not a directory"
    if is_directory(path / CHECKPOINTS):
        return "" if Store(path / CHECKPOINTS).steps() else f"{name} is a run without a checkpoint"
    if why_no_file(path / MARKER):
        return f"{name} is not a complete checkpoint: it has no file {MARKER!r}"
    try:
        read_state(path)
    except CheckpointError as error:
        return str(error)
    return ""
