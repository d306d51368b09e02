"""Where the checkpoints of a run are: <run>/checkpoints/step-00000010, one directory a step."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable, Mapping
from itertools import count
from pathlib import Path

from roll_r3.config.disk import read_at_most
from roll_r3.errors import CheckpointError
from roll_r3.saving.manifest import FileSum, seal, sync_directory, verify, write_durably

CHECKPOINTS, EXPORTS = "checkpoints", "hf"
_ORDER, _MAX_ORDER = ".order", 16
"""In a run's directory: a file with its number among those of its experiment."""
_STEP = re.compile(r"step-(\d{8,})")
_RUN = re.compile(r"(\d{8})-(\d{6})(?:-(\d+))?")
"""The name that a run gives itself. A copy that somebody made of one has another, and is none to go on in."""


class Store:
    """Directories that appear when all of them is there, and under one name each.

    What is being written has a name that begins with a dot, and so has what is being removed: either may stay behind
    when the process dies, and is removed by the next that writes here.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def path(self, step: int) -> Path:
        return self.folder / f"step-{step:08d}"

    def _partial(self, step: int) -> Path:
        return self.folder / f".{self.path(step).name}.partial"

    def steps(self) -> list[int]:
        """Those that have a directory, in order."""
        try:
            names = os.listdir(self.folder)
        except FileNotFoundError:
            return []
        return sorted(int(found[1]) for name in names if (found := _STEP.fullmatch(name)))

    def try_out(self) -> None:
        """Save a few bytes as a checkpoint is saved, and remove them.

        Raises:
            OSError: the disk does not let that be done.
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
        """An empty directory to write into; `finish` gives it its name.

        Raises:
            CheckpointError: there is one of this step already.
            OSError: it cannot be made.
        """
        if self.path(step).exists():
            raise CheckpointError(f"{self.path(step)} is there already")
        self.folder.mkdir(parents=True, exist_ok=True)
        for left in self.folder.glob(".*"):
            shutil.rmtree(left, ignore_errors=True)
        partial = self._partial(step)
        partial.mkdir()
        return partial

    def seal(self, step: int, sums: Mapping[str, FileSum]) -> None:
        """Say of what was written that it is whole (see `manifest.seal`)."""
        seal(self._partial(step), sums)

    def finish(self, step: int) -> Path:
        """Give what was written its name."""
        os.rename(self._partial(step), self.path(step))
        sync_directory(self.folder)
        return self.path(step)

    def abandon(self, step: int) -> None:
        """Remove what was written; never raises."""
        shutil.rmtree(self._partial(step), ignore_errors=True)

    def keep(self, newest: int) -> None:
        """Remove all but so many of the newest; 0: remove none.

        Raises:
            OSError: one cannot be removed. It has lost its name by then.
        """
        for step in self.steps()[:-newest] if newest else []:
            self._remove(step)

    def set_aside_after(self, step: int, suffix: str) -> list[Path]:
        """Rename what belongs to later steps, so that they can be saved anew; where it is now.

        What was set aside before stays: the name gets a number then.
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
        os.rename(self.path(step), hidden)  # what is half removed must not look like a checkpoint
        shutil.rmtree(hidden)

    def newest_whole(self, say: Callable[[str], None]) -> Path | None:
        """The newest checkpoint that is as it was saved; None: there is no checkpoint.

        Args:
            say: is told of each newer one, and what is wrong with it.

        Raises:
            CheckpointError: there are checkpoints, and every one of them is damaged.
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
    """Name of the newest run of an experiment that has a checkpoint: that begun, or gone on with, last.

    Args:
        experiment: the directory with the runs' checkpoints.
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
    """Names of the directories of an experiment that hold checkpoints."""
    return sorted(
        entry.name
        for entry in os.scandir(experiment)
        if entry.is_dir(follow_symlinks=False) and Store(Path(entry.path) / CHECKPOINTS).steps()
    )


def mark_newest(run: Path) -> None:
    """Number a run that begins, or goes on, higher than all others of its experiment: clocks and time zones change.

    Args:
        run: its directory, which nobody else writes in.
    """
    others = [Path(entry.path) for entry in os.scandir(run.parent) if entry.is_dir(follow_symlinks=False)]
    highest = max((_order(other) for other in others if other != run), default=0)
    if _order(run) <= highest:
        partial = run / f"{_ORDER}.partial"
        write_durably(partial, f"{highest + 1}\n")
        partial.replace(run / _ORDER)


def _order(run: Path) -> int:
    """0: it has no number, as those of earlier releases."""
    try:
        text = read_at_most(run / _ORDER, _MAX_ORDER).decode().strip()
    except (OSError, ValueError):
        return 0
    return int(text) if text.isascii() and text.isdigit() else 0
