"""Directories of a run's checkpoints: <run>/checkpoints/step-00000010, one per saved step."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable, Mapping
from itertools import count
from pathlib import Path

from roll_r3.config.reading.disk import read_at_most
from roll_r3.errors import CheckpointError
from roll_r3.saving.manifest import FileSum, seal, sync_directory, verify, write_durably

CHECKPOINTS, EXPORTS = "checkpoints", "hf"
_ORDER, _MAX_ORDER = ".order", 16
"""File in a run's directory with its number among the runs of its experiment, and the file's maximum size."""
_STEP = re.compile(r"step-(\d{8,})")
_RUN = re.compile(r"(\d{8})-(\d{6})(?:-(\d+))?")
"""Directory name of a run. Copies with other names are never resumed."""


class Store:
    """Directory of checkpoints; each appears under its name only when complete.

    While a checkpoint is written or removed, its name begins with a dot. A killed process may leave such a directory;
    the next save removes it.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def path(self, step: int) -> Path:
        return self.folder / f"step-{step:08d}"

    def _partial(self, step: int) -> Path:
        return self.folder / f".{self.path(step).name}.partial"

    def steps(self) -> list[int]:
        """Return the saved steps, in order."""
        try:
            names = os.listdir(self.folder)
        except FileNotFoundError:
            return []
        return sorted(int(found[1]) for name in names if (found := _STEP.fullmatch(name)))

    def try_out(self) -> None:
        """Save and remove a few bytes in the way of a checkpoint, to test the disk.

        Raises:
            OSError: the disk does not allow it.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        partial, done = self.folder / ".trial.partial", self.folder / ".trial"
        try:
            for left in (partial, done):
                shutil.rmtree(left, ignore_errors=True)
            partial.mkdir()
            write_durably(partial / "file", "trial\n")
            sync_directory(partial)
            os.rename(partial, done)
            sync_directory(self.folder)
        finally:
            for left in (partial, done):
                shutil.rmtree(left, ignore_errors=True)

    def begin(self, step: int) -> Path:
        """Make an empty directory to write into; `finish` gives it its name.

        Raises:
            CheckpointError: the step is saved already.
            OSError: the directory cannot be made.
        """
        if self.path(step).exists():
            raise CheckpointError(f"{self.path(step)} exists already")
        self.folder.mkdir(parents=True, exist_ok=True)
        for left in self.folder.glob(".*"):
            shutil.rmtree(left, ignore_errors=True)
        partial = self._partial(step)
        partial.mkdir()
        return partial

    def seal(self, step: int, sums: Mapping[str, FileSum]) -> None:
        """Seal the written directory (see `manifest.seal`)."""
        seal(self._partial(step), sums)

    def finish(self, step: int) -> Path:
        """Give the written directory its name."""
        os.rename(self._partial(step), self.path(step))
        sync_directory(self.folder)
        return self.path(step)

    def abandon(self, step: int) -> None:
        """Remove the unfinished directory; never raises."""
        shutil.rmtree(self._partial(step), ignore_errors=True)

    def keep(self, newest: int) -> None:
        """Remove all but the newest checkpoints.

        Args:
            newest: number to keep; 0: all.

        Raises:
            OSError: a checkpoint cannot be removed. It is already renamed by then.
        """
        for step in self.steps()[:-newest] if newest else []:
            self._remove(step)

    def set_aside_after(self, step: int, suffix: str) -> list[Path]:
        """Rename the checkpoints of later steps, so that these steps can be saved again; returns the new paths.

        Earlier renamed checkpoints stay: the new name gets a number.
        """
        moved = []
        for later in [s for s in self.steps() if s > step]:
            names = (f".{suffix}-{number}" if number > 1 else f".{suffix}" for number in count(1))
            aside = next(a for name in names if not os.path.lexists(a := self.path(later).with_suffix(name)))
            os.rename(self.path(later), aside)
            moved.append(aside)
        return moved

    def _remove(self, step: int) -> None:
        hidden = self.folder / f".{self.path(step).name}.removed"
        os.rename(self.path(step), hidden)  # a partly removed checkpoint must not look like a complete one
        shutil.rmtree(hidden)

    def newest_intact(self, say: Callable[[str], None]) -> Path | None:
        """Return the newest intact checkpoint; None if there are no checkpoints.

        Args:
            say: receives a message for each newer, damaged checkpoint.

        Raises:
            CheckpointError: all checkpoints are damaged.
        """
        steps = self.steps()
        for step in reversed(steps):
            try:
                verify(self.path(step))
            except CheckpointError as error:
                say(f"checkpoint {self.path(step)} is DAMAGED: {error}; looking for one before it")
            else:
                return self.path(step)
        if steps:
            raise CheckpointError(f"every checkpoint in {self.folder} is damaged")
        return None


def newest_run(experiment: Path) -> str | None:
    """Return the name of the run with a checkpoint that was started or resumed last.

    Args:
        experiment: directory of the runs' checkpoints.
    """
    try:
        names = [entry.name for entry in os.scandir(experiment) if entry.is_dir(follow_symlinks=False)]
    except FileNotFoundError:
        return None
    runs = [found for name in names if (found := _RUN.fullmatch(name))]
    saved = [run for run in runs if Store(experiment / run[0] / CHECKPOINTS).steps()]
    newest = max(saved, key=lambda run: (_order(experiment / run[0]), *map(int, run.groups("0"))), default=None)
    return newest[0] if newest else None


def runs_saved(experiment: Path) -> list[str]:
    """Return the names of an experiment's directories with checkpoints."""
    return sorted(
        entry.name
        for entry in os.scandir(experiment)
        if entry.is_dir(follow_symlinks=False) and Store(Path(entry.path) / CHECKPOINTS).steps()
    )


def mark_newest(run: Path) -> None:
    """Give a started or resumed run the highest number of its experiment, as clocks and time zones change.

    Args:
        run: directory of the run, locked by this process.
    """
    others = [Path(entry.path) for entry in os.scandir(run.parent) if entry.is_dir(follow_symlinks=False)]
    highest = max((_order(other) for other in others if other != run), default=0)
    if _order(run) <= highest:
        partial = run / f"{_ORDER}.partial"
        write_durably(partial, f"{highest + 1}\n")
        partial.replace(run / _ORDER)


def _order(run: Path) -> int:
    """Return the number of a run; 0 without one, as in earlier releases."""
    try:
        text = read_at_most(run / _ORDER, _MAX_ORDER).decode().strip()
    except (OSError, ValueError):
        return 0
    return int(text) if text.isascii() and text.isdigit() else 0
