"""Run without training: the loop around the saving, and a trainer of two files."""

from __future__ import annotations

import io
import json
from datetime import datetime
from pathlib import Path
from threading import Event
from typing import Any

from roll_r3.config.pipeline import RLVRConfig
from roll_r3.data.draws import NOWHERE
from roll_r3.data.prompts import Prompt
from roll_r3.pipelines.lifecycle.checkpoints import Checkpoints, stores_of
from roll_r3.pipelines.lifecycle.places import place_of
from roll_r3.pipelines.lifecycle.resume import (
    data_of,
    opened,
    rewind,
    source_of,
)
from roll_r3.pipelines.lifecycle.shutdown import Shutdown
from roll_r3.saving.manifest import FileSum, file_sum
from roll_r3.tracking.progress import Progress

PROMPTS = [Prompt(f"p{i}", f"{i}", (i, i + 1), str(i), domain="xy"[i % 2]) for i in range(10)]


def section_of(domain: str) -> str:
    return {"x": "a", "y": "b"}[domain]


class TwoFiles:
    """Stand-in for the trainer's ranks."""

    def __init__(self) -> None:
        self.may_write = Event()
        self.may_write.set()
        self.calls: list[str] = []

    def take_snapshot(self) -> None:
        self.calls.append("snapshot")

    def write_snapshot(self, path: Path) -> dict[str, FileSum]:
        assert self.may_write.wait(30)
        path.mkdir()
        for name in "ab":
            (path / name).write_bytes(name.encode() * 20_000)
        self.calls.append("written")
        return {name: file_sum(path / name) for name in "ab"}

    def save_hf(self, path: Path) -> dict[str, int]:
        self.calls.append("exported")
        (path / "model.safetensors").write_bytes(b"x")
        return {"model.safetensors": 1}


def config_of(tmp_path: Path, **changed: Any) -> RLVRConfig:
    fields = {"exp_name": "exp", "pretrain": "p", "output_dir": str(tmp_path), "max_steps": 10, "save_steps": 2}
    return RLVRConfig(**(fields | {"actor_train": {}, "actor_infer": {}, "rollout_batch_size": 4} | changed))


class RecordedProgress(Progress):
    """Recorder of progress messages."""

    def __init__(self, lines: list[str]) -> None:
        super().__init__(10, io.StringIO())
        self._lines = lines

    def say(self, text: str) -> None:
        if not text.endswith(" ..."):  # a stage
            self._lines.append(text)


class FakeRun:
    """Loop around the saving, without training."""

    def __init__(self, config: RLVRConfig, *, hour: int = 1, late: int = 0) -> None:
        """
        Args:
            late: additional prompts of a step and section, which come back unused.
        """
        self.config, self.late = config, late
        self.drawn: list[list[int]] = []
        """Prompts of each step and section."""
        self.said: list[str] = []
        with opened(config, datetime(2026, 1, 1, hour), RecordedProgress(self.said)) as (self.run_dir, self.point):
            pass
        self.checkpoints, self.exports = stores_of(self.run_dir)
        self.done = self.point.state.step if self.point else 0
        self.source = source_of(config, PROMPTS, section_of, place_of(self.point.state.data) if self.point else NOWHERE)
        if self.point:
            rewind(self.run_dir, self.point, self.said.append)
        self.trainer: Any = TwoFiles()
        self.shutdown = Shutdown(60.0)
        self.saving = Checkpoints(
            config,
            self.run_dir,
            self.trainer,
            data=data_of(PROMPTS, config.seed),
            begun=self.done,
            shutdown=self.shutdown,
            say=self.said.append,
        )

    def run_to(self, last: int) -> FakeRun:
        for step in range(self.done + 1, last + 1):
            with self.run_dir.metrics_file.open("a") as stream:
                stream.write(json.dumps({"step": step}) + "\n")
            with self.run_dir.samples_file.open("a") as stream:
                stream.write(json.dumps({"step": step, "sample": "x"}) + "\n")
            self.done = step
            self.draw()
            self.saving.step_done(step, 32 * step, self.source.place)
        return self

    def draw(self) -> None:
        """Draw the prompts of a step."""
        for part in self.source.parts:
            part.begin()
            numbers = part.draw(part.size + self.late)
            self.drawn.append(numbers)
            part.end(numbers[:: part.size][: self.late])

    def steps_in(self, path: Path) -> list[int]:
        return [json.loads(line)["step"] for line in path.read_text().splitlines()]
