"""What a run saves and when, what it goes on from, and what it does when that is damaged or the disk is full.

The trainer is a stand-in: two files in the place of its tensors, whose writing is tested where the real ones are.
"""

from __future__ import annotations

import errno
import io
import json
import os
import resource
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from datetime import datetime
from pathlib import Path
from threading import Event, Timer
from typing import Any

import pytest

from roll_r3.config.pipeline import RLVRConfig
from roll_r3.config.yaml_file import to_yaml
from roll_r3.data.prompts import Prompt
from roll_r3.errors import CheckpointError, ConfigError, LostWorkerError, RollError
from roll_r3.pipelines.checkpoints import Checkpoints, lacks_export, stores_of
from roll_r3.pipelines.leaving import Leave, LeaveNow, Leaving
from roll_r3.pipelines.resume import (
    ResumePoint,
    changes,
    data_of,
    opened,
    put_back,
)
from roll_r3.saving.manifest import FileSum, file_sum, verify
from roll_r3.saving.state import read_state
from roll_r3.tracking.progress import Progress

PROMPTS = [Prompt(f"p{i}", f"{i}", (i, i + 1), str(i)) for i in range(10)]


class TwoFiles:
    """In the place of the trainer's ranks."""

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
            (path / name).write_bytes(name.encode() * 5000)
        self.calls.append("written")
        return {name: file_sum(path / name) for name in "ab"}

    def save_hf(self, path: Path) -> dict[str, int]:
        self.calls.append("exported")
        (path / "model.safetensors").write_bytes(b"x")
        return {"model.safetensors": 1}


def config_of(tmp_path: Path, **changed: Any) -> RLVRConfig:
    fields = {"exp_name": "exp", "pretrain": "p", "output_dir": str(tmp_path), "max_steps": 10, "save_steps": 2}
    return RLVRConfig(**(fields | {"actor_train": {}, "actor_infer": {}, "rollout_batch_size": 4} | changed))


class Said(Progress):
    """Takes down what is said."""

    def __init__(self, lines: list[str]) -> None:
        super().__init__(10, io.StringIO())
        self._lines = lines

    def say(self, text: str) -> None:
        if not text.endswith(" ..."):  # a stage
            self._lines.append(text)


class FakeRun:
    """The loop around what saves, without what is trained."""

    def __init__(self, config: RLVRConfig, *, hour: int = 1) -> None:
        self.config = config
        self.said: list[str] = []
        with opened(config, datetime(2026, 1, 1, hour), Said(self.said)) as (self.run_dir, self.point):
            pass
        self.checkpoints, self.exports = stores_of(self.run_dir)
        self.done = self.point.state.step if self.point else 0
        data = data_of(PROMPTS, config.seed, self.point.state.data.drawn if self.point else ())
        if self.point:
            put_back(self.run_dir, self.point, self.said.append)
        self.trainer: Any = TwoFiles()
        self.leaving = Leaving(60.0)
        self.saving = Checkpoints(
            config,
            self.run_dir,
            self.trainer,
            data=data,
            begun=self.done,
            leaving=self.leaving,
            say=self.said.append,
        )

    def run_to(self, last: int) -> FakeRun:
        for step in range(self.done + 1, last + 1):
            with self.run_dir.metrics_file.open("a") as stream:
                stream.write(json.dumps({"step": step}) + "\n")
            with self.run_dir.samples_file.open("a") as stream:
                stream.write(json.dumps({"step": step, "sample": "x"}) + "\n")
            self.done = step
            self.saving.step_done(step, samples_seen=32 * step)
        return self

    def steps_in(self, path: Path) -> list[int]:
        return [json.loads(line)["step"] for line in path.read_text().splitlines()]


def test_a_checkpoint_holds_what_a_run_goes_on_from(tmp_path):
    run = FakeRun(config_of(tmp_path)).run_to(5)
    assert run.checkpoints.steps() == [2, 4]
    path = run.checkpoints.path(4)
    verify(path)
    names = {file.relative_to(path).as_posix() for file in path.rglob("*") if file.is_file()}
    assert names == {
        "trainer/a",
        "trainer/b",
        "config.yaml",
        "metrics.jsonl",
        "state.json",
        "manifest.json",
        "complete",
    }
    assert (path / "config.yaml").read_text() == to_yaml(run.config)
    assert run.steps_in(path / "metrics.jsonl") == [1, 2, 3, 4]
    state = read_state(path)
    assert (state.step, state.samples_seen, state.trainer) == (4, 128, "megatron_train")
    assert state.data.drawn == ((4, 4),)
    assert any(str(path) in said for said in run.said), "it says what it has saved, once it is there"


def test_the_last_step_is_saved_whatever_its_number(tmp_path):
    run = FakeRun(config_of(tmp_path, max_steps=7, save_steps=5, save_hf_steps=3)).run_to(7)
    assert run.checkpoints.steps() == [5, 7]
    assert run.exports.steps() == [3, 6, 7]
    assert (run.exports.path(7) / "model.safetensors").is_file()
    nothing = FakeRun(config_of(tmp_path / "none", max_steps=3, save_steps=0)).run_to(3)
    assert not nothing.checkpoints.folder.exists()
    assert not nothing.exports.folder.exists()


def test_the_newest_are_kept(tmp_path):
    run = FakeRun(config_of(tmp_path, max_ckpt_to_keep=2)).run_to(9)
    assert run.checkpoints.steps() == [6, 8]


def test_what_cannot_be_removed_does_not_end_the_run(tmp_path, monkeypatch):
    run = FakeRun(config_of(tmp_path, max_ckpt_to_keep=1)).run_to(3)

    def fail(path: Path, ignore_errors: bool = False) -> None:
        if not ignore_errors:
            raise OSError("stale file handle")

    monkeypatch.setattr("roll_r3.saving.store.shutil.rmtree", fail)
    run.run_to(4)
    assert run.said[-1] == "an older checkpoint could not be removed: stale file handle"
    monkeypatch.undo()
    run.run_to(6)
    assert [entry.name for entry in run.checkpoints.folder.iterdir()] == ["step-00000006"]


def test_checkpoints_may_be_on_another_disk(tmp_path):
    config = config_of(tmp_path / "runs", checkpoint_config={"output_dir": str(tmp_path / "disk")})
    run = FakeRun(config).run_to(2)
    assert run.checkpoints.folder == tmp_path / "disk" / "exp" / run.run_dir.path.name / "checkpoints"
    assert run.checkpoints.steps() == [2]
    again = FakeRun(config.model_copy(update={"resume_from_checkpoint": "auto"}))
    assert again.done == 2
    assert again.run_dir == run.run_dir


def test_auto_goes_on_with_the_run_in_its_directory(tmp_path):
    config = config_of(tmp_path, resume_from_checkpoint="auto")
    first = FakeRun(config)
    assert first.point is None
    assert "no run in" in first.said[0]
    first.run_to(5)
    FakeRun(config_of(tmp_path), hour=2)  # one that died before its first checkpoint
    again = FakeRun(config)
    assert again.run_dir == first.run_dir
    assert again.done == 4
    assert again.steps_in(again.run_dir.metrics_file) == [1, 2, 3, 4], "step 5 is done again"
    assert again.steps_in(again.run_dir.samples_file) == [1, 2, 3, 4]
    again.run_to(6)
    assert again.steps_in(again.run_dir.metrics_file) == [1, 2, 3, 4, 5, 6]
    assert again.steps_in(again.checkpoints.path(6) / "metrics.jsonl") == [1, 2, 3, 4, 5, 6]
    assert read_state(again.checkpoints.path(6)).data.drawn == ((6, 4),)


def test_a_path_begins_a_new_run_there(tmp_path):
    first = FakeRun(config_of(tmp_path)).run_to(5)
    named = str(first.checkpoints.path(2))
    other = FakeRun(config_of(tmp_path, resume_from_checkpoint=named, rollout_batch_size=8), hour=2).run_to(4)
    assert other.run_dir != first.run_dir
    assert other.steps_in(other.run_dir.metrics_file) == [1, 2, 3, 4]
    assert other.steps_in(other.run_dir.samples_file) == [3, 4], "what it sampled itself"
    assert first.checkpoints.steps() == [2, 4]
    assert first.steps_in(first.run_dir.metrics_file) == [1, 2, 3, 4, 5]
    assert read_state(other.checkpoints.path(4)).data.drawn == ((2, 4), (2, 8))


def test_a_damaged_checkpoint_is_named_and_the_one_before_it_is_used(tmp_path):
    config = config_of(tmp_path, resume_from_checkpoint="auto")
    first = FakeRun(config).run_to(6)
    (first.checkpoints.path(6) / "trainer" / "a").write_bytes(b"a" * 4999)
    again = FakeRun(config)
    assert again.done == 4
    assert "step-00000006 is DAMAGED: trainer/a has 4999 bytes, and had 5000" in again.said[0]
    assert "step-00000006.damaged" in again.said[1]
    again.run_to(6)
    verify(again.checkpoints.path(6))


def test_what_another_process_saves_as_it_leaves_is_gone_on_from(tmp_path):
    """It is looked for under the lock, so that nothing that is whole is taken for damaged."""
    config = config_of(tmp_path, resume_from_checkpoint="auto")
    first = FakeRun(config).run_to(2)
    with first.run_dir.locked(print), pytest.raises(ConfigError, match="another process runs in"):
        FakeRun(config)
    first.run_to(4)
    again = FakeRun(config)
    assert again.done == 4
    assert again.checkpoints.steps() == [2, 4]


@pytest.mark.parametrize("number", ["ESTALE", "EIO", "ENOTCONN"])
def test_a_checkpoint_that_cannot_be_read_just_now_is_not_damaged(tmp_path, monkeypatch, number):
    config = config_of(tmp_path, resume_from_checkpoint="auto")
    run = FakeRun(config).run_to(4)
    stat = os.stat

    def refused(path: Any, **more: Any) -> os.stat_result:
        if str(path).endswith("step-00000004/complete"):
            raise OSError(getattr(errno, number), "it is away")
        return stat(path, **more)

    with monkeypatch.context() as patch:
        patch.setattr(os, "stat", refused)
        with pytest.raises(RollError, match=r"nothing can be said of .*step-00000004.*it is away") as stopped:
            FakeRun(config)
    assert not isinstance(stopped.value, CheckpointError)
    assert run.checkpoints.steps() == [2, 4]
    assert FakeRun(config).done == 4


def test_an_export_that_was_due_when_a_run_ended_is_made_by_the_next(tmp_path):
    config = config_of(tmp_path, save_hf_steps=5, resume_from_checkpoint="auto", max_steps=10)
    run = FakeRun(config).run_to(9)
    run.done = 10

    def full(path: Path) -> dict[str, int]:
        raise CheckpointError("No space left on device")

    run.trainer.save_hf = full
    with pytest.raises(CheckpointError, match=r"step 10 was not exported: No space left on device\n") as stopped:
        run.saving.step_done(10, samples_seen=320)
    assert "there is step 2, step 4, step 6, step 8, step 10" in str(stopped.value), "of checkpoints"
    again = FakeRun(config)
    assert again.done == 10
    assert lacks_export(config, again.run_dir, 10), "so there is something to do"
    again.saving.catch_up(10)
    assert again.exports.steps() == [5, 10]
    again.saving.catch_up(10)
    assert again.trainer.calls == ["exported"]
    assert not lacks_export(config, again.run_dir, 10)
    assert not lacks_export(config, again.run_dir, 8), "not due"


def test_a_run_that_begins_at_another_ones_checkpoint_exports_nothing_of_it(tmp_path):
    first = FakeRun(config_of(tmp_path)).run_to(4)
    named = config_of(tmp_path, save_hf_steps=2, resume_from_checkpoint=str(first.checkpoints.path(4)))
    other = FakeRun(named, hour=2)
    other.saving.catch_up(4)
    assert other.exports.steps() == []


@pytest.mark.parametrize("there", [None, b"xy"], ids=["nothing", "something else"])
def test_an_export_onto_a_disk_of_another_node_is_not_called_saved(tmp_path, there):
    run = FakeRun(config_of(tmp_path, save_hf_steps=2))

    def elsewhere(path: Path) -> dict[str, int]:
        if there is not None:
            (path / "model.safetensors").write_bytes(there)
        return {"model.safetensors": 1}

    run.trainer.save_hf = elsewhere
    with pytest.raises(CheckpointError, match=r"step 2 was not exported: .*every node must see the directory"):
        run.run_to(2)
    assert run.exports.steps() == []
    assert not any("/hf/" in said for said in run.said)


def test_samples_keep_what_ends_a_line_elsewhere(tmp_path):
    config = config_of(tmp_path, resume_from_checkpoint="auto")
    run = FakeRun(config).run_to(3)
    lines = [json.dumps({"step": s, "sample": "a\u2028b\u0085c\x0bd"}, ensure_ascii=False) + "\n" for s in (1, 2, 3)]
    run.run_dir.samples_file.write_text("".join(lines))
    again = FakeRun(config)
    assert again.done == 2
    assert again.run_dir.samples_file.read_text() == "".join(lines[:2])


def test_where_all_are_damaged_nothing_starts(tmp_path):
    config = config_of(tmp_path, resume_from_checkpoint="auto")
    run = FakeRun(config).run_to(2)
    (run.checkpoints.path(2) / "state.json").unlink()
    with pytest.raises(CheckpointError, match="the run does not start over by itself"):
        FakeRun(config)


def test_a_damaged_checkpoint_that_is_named_is_refused(tmp_path):
    run = FakeRun(config_of(tmp_path)).run_to(4)
    (run.checkpoints.path(4) / "complete").unlink()
    with pytest.raises(ConfigError, match="cannot be gone on from: it was not completed"):
        FakeRun(config_of(tmp_path, resume_from_checkpoint=str(run.checkpoints.path(4))))


@contextmanager
def files_up_to(size: int) -> Iterator[None]:
    """Larger ones cannot be written, as where the disk is full."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("size", [4096, 6000], ids=["trainer", "configuration"])
def test_a_full_disk_stops_the_run_and_leaves_what_was_saved(tmp_path, size):
    config = config_of(tmp_path, resume_from_checkpoint="auto", max_ckpt_to_keep=1)
    if size == 6000:
        config = config.model_copy(update={"rewards": {f"rule{i}": config.rewards["default"] for i in range(200)}})
    run = FakeRun(config).run_to(3)
    with files_up_to(size), pytest.raises(CheckpointError, match=r"step 4 was not saved: .*File too large") as stopped:
        run.saving.step_done(4, samples_seen=128)
    assert "there is step 2" in str(stopped.value)
    assert [entry.name for entry in run.checkpoints.folder.iterdir()] == ["step-00000002"]
    verify(run.checkpoints.path(2))
    again = FakeRun(config).run_to(4)
    assert again.checkpoints.steps() == [4]


def beside(tmp_path: Path, **changed: Any) -> FakeRun:
    """A run that writes its checkpoints beside its steps."""
    return FakeRun(config_of(tmp_path, checkpoint_config={"async_save": True}, **changed))


def test_a_checkpoint_is_written_beside_the_steps_that_follow(tmp_path):
    run = beside(tmp_path)
    run.trainer.may_write.clear()
    run.run_to(3)
    assert run.checkpoints.steps() == []
    assert not any("saved" in said for said in run.said), "nothing is said to be saved before it is"
    run.trainer.may_write.set()
    run.saving.wait()
    assert run.checkpoints.steps() == [2]
    assert str(run.checkpoints.path(2)) in run.said[-1]
    verify(run.checkpoints.path(2))
    assert run.steps_in(run.checkpoints.path(2) / "metrics.jsonl") == [1, 2], "none of a step after it"
    assert run.saving.seconds_waited() < 10


def test_the_next_checkpoint_and_an_export_wait_for_the_one_before(tmp_path):
    run = beside(tmp_path, save_hf_steps=5)
    run.trainer.may_write.clear()
    run.run_to(3)
    assert run.trainer.calls == ["snapshot"]
    Timer(0.3, run.trainer.may_write.set).start()
    run.run_to(4)
    assert run.trainer.calls[:3] == ["snapshot", "written", "snapshot"]
    assert run.saving.seconds_waited() > 0.1
    assert run.saving.seconds_waited() == 0
    run.saving.wait()
    run.trainer.may_write.clear()
    run.done = 5
    Timer(0.3, run.trainer.may_write.set).start()
    run.saving.step_done(6, samples_seen=192)
    Timer(0.3, run.trainer.may_write.set).start()
    run.saving.step_done(10, samples_seen=320)
    assert run.trainer.calls[-3:] == ["snapshot", "written", "exported"]


@pytest.mark.parametrize("error", [None, RuntimeError, SystemExit])
def test_the_end_of_a_run_waits_for_what_is_being_written(tmp_path, error):
    run = beside(tmp_path)
    run.trainer.may_write.clear()

    def end() -> None:
        with run.saving:
            run.run_to(2)
            Timer(0.3, run.trainer.may_write.set).start()
            if error:
                raise error

    with pytest.raises(error) if error else nullcontext():
        end()
    verify(run.checkpoints.path(2))


@pytest.mark.parametrize(
    ("error", "raised"),
    [(LostWorkerError("an engine's node"), LostWorkerError), (None, Leave)],
    ids=["loss", "no error"],
)
def test_sigterm_at_the_end_of_a_run_waits_for_what_is_being_written(tmp_path, error, raised):
    run = beside(tmp_path)
    run.trainer.may_write.clear()

    def end() -> None:
        with run.leaving, run.saving:
            run.run_to(2)
            Timer(0.2, os.kill, (os.getpid(), signal.SIGTERM)).start()
            Timer(0.5, run.trainer.may_write.set).start()
            if error:
                raise error

    with pytest.raises(raised):
        end()
    assert run.leaving.asked
    verify(run.checkpoints.path(2))


@pytest.mark.parametrize("at_once", [LeaveNow(), KeyboardInterrupt()], ids=["SIGTERM again", "Ctrl-C"])
def test_who_is_to_leave_at_once_waits_for_nothing(tmp_path, at_once):
    run = beside(tmp_path)
    run.trainer.may_write.clear()

    def end() -> None:
        with run.saving:
            run.run_to(2)
            raise at_once

    with pytest.raises(type(at_once)):
        end()
    assert run.checkpoints.steps() == []
    run.trainer.may_write.set()


def test_a_run_that_is_left_saves_no_step_twice(tmp_path):
    run = beside(tmp_path)
    run.trainer.may_write.clear()
    Timer(0.3, run.trainer.may_write.set).start()
    run.run_to(2).saving.leave(2, samples_seen=64)
    assert run.trainer.calls == ["snapshot", "written"]
    run.run_to(3).saving.leave(3, samples_seen=96)
    assert run.checkpoints.steps() == [2, 3], "and is waited for"


@pytest.mark.parametrize("notices", ["the step after it", "the next to be saved", "the end"])
def test_a_full_disk_stops_a_run_that_did_not_wait(tmp_path, notices):
    run = beside(tmp_path, max_ckpt_to_keep=1).run_to(3)
    run.saving.wait()
    run.trainer.may_write.clear()

    def go_on() -> None:
        with run.saving:
            run.run_to(4)
            if notices == "the step after it":
                run.trainer.may_write.set()
                while not run.saving._under_way.done():
                    time.sleep(0.01)
                run.run_to(5)
                pytest.fail("the step after it says so")
            Timer(0.2, run.trainer.may_write.set).start()
            if notices == "the next to be saved":
                run.run_to(6)
                pytest.fail("the next to be saved waits for it, and says so")

    with files_up_to(4096), pytest.raises(CheckpointError, match=r"step 4 was not saved: .*File too large") as stopped:
        go_on()
    assert "there is step 2" in str(stopped.value)
    assert not any("was not saved" in said for said in run.said), "it is raised, once"
    assert [entry.name for entry in run.checkpoints.folder.iterdir()] == ["step-00000002"]
    verify(run.checkpoints.path(2))


def test_a_failure_to_save_does_not_hide_the_error_before_it(tmp_path):
    run = beside(tmp_path)
    run.trainer.may_write.clear()

    def end() -> None:
        with run.saving:
            run.run_to(2)
            run.trainer.may_write.set()
            raise RuntimeError("the engine died")

    with files_up_to(4096), pytest.raises(RuntimeError, match="the engine died"):
        end()
    assert "step 2 was not saved: " in run.said[-1]


def test_changed_fields_are_named(tmp_path):
    run = FakeRun(config_of(tmp_path)).run_to(2)
    point = ResumePoint(run.checkpoints.path(2), read_state(run.checkpoints.path(2)))
    assert changes(run.config, point) == []
    layout = {"strategy_args": {"strategy_config": {"tensor_model_parallel_size": 2}}}
    other = config_of(tmp_path, max_steps=20, resume_from_checkpoint="auto", actor_train=layout)
    assert changes(other, point) == [
        "  max_steps: 10 -> 20",
        "  actor_train.strategy_args.strategy_config.tensor_model_parallel_size: 1 -> 2",
    ]


def test_weights_of_a_step_that_is_done_again_are_in_nobodys_way(tmp_path):
    config = config_of(tmp_path, save_steps=4, save_hf_steps=3, resume_from_checkpoint="auto")
    FakeRun(config).run_to(7)
    run = FakeRun(config).run_to(6)
    assert run.exports.steps() == [3, 6]
    assert sorted(path.name for path in run.exports.folder.iterdir())[-1] == "step-00000006.earlier"
    assert any("done again" in said for said in run.said)


def test_a_run_that_begins_again_has_no_history(tmp_path):
    run = FakeRun(config_of(tmp_path, save_hf_steps=1)).run_to(1)
    put_back(run.run_dir, None, run.said.append)
    assert run.run_dir.metrics_file.read_text() == run.run_dir.samples_file.read_text() == ""
    assert run.exports.steps() == []


def test_what_is_left_is_saved_once(tmp_path):
    run = FakeRun(config_of(tmp_path, save_steps=3)).run_to(5)
    run.saving.leave(5, 160)
    run.saving.leave(5, 160)
    assert run.checkpoints.steps() == [3, 5]
    verify(run.checkpoints.path(5))
    again = FakeRun(config_of(tmp_path, resume_from_checkpoint="auto"))
    again.saving.leave(5, 160)
    assert again.checkpoints.steps() == [3, 5], "nothing was done since"
    none = FakeRun(config_of(tmp_path / "none", save_steps=0)).run_to(2)
    none.saving.leave(2, 64)
    assert none.checkpoints.steps() == []
    assert none.said == ["nothing is saved: save_steps is 0"]


@pytest.mark.parametrize("async_save", [False, True])
def test_a_lost_worker_while_saving_is_no_full_disk(tmp_path, async_save):
    """The run goes on from an older checkpoint by itself, and nothing is in its way."""
    run = FakeRun(config_of(tmp_path, checkpoint_config={"async_save": async_save})).run_to(3)
    run.saving.wait()

    def die(path: Path) -> None:
        path.mkdir()
        (path / "half").write_text("")
        raise LostWorkerError("actor_train-1 died")

    run.trainer.write_snapshot = die
    with pytest.raises(LostWorkerError, match="actor_train-1 died"), run.saving:
        run.run_to(4)
    assert [path.name for path in run.checkpoints.folder.iterdir()] == ["step-00000002"]


SAYS_NO_CONFIGURATION = {
    "aliases that double": "a: &a {x: 1}\n"
    + "".join(f"b{i}: &b{i} {{p: *{f'b{i - 1}' if i else 'a'}, q: *{f'b{i - 1}' if i else 'a'}}}\n" for i in range(40)),
    "a tag": "a: !!python/object/apply:os.mkdir [x]",
    "no YAML": "{",
    "nothing": None,
}


@pytest.mark.timeout(30)
@pytest.mark.parametrize("text", SAYS_NO_CONFIGURATION.values(), ids=SAYS_NO_CONFIGURATION)
def test_a_checkpoint_whose_configuration_is_none_is_refused(tmp_path, text):
    run = FakeRun(config_of(tmp_path)).run_to(2)
    path = run.checkpoints.path(2)
    (path / "config.yaml").unlink() if text is None else (path / "config.yaml").write_text(text)
    with pytest.raises(CheckpointError, match=r"config\.yaml cannot be read"):
        changes(run.config, ResumePoint(path, read_state(path)))


@pytest.mark.parametrize("text", ["[" * 100_000, "[]", "{}", '{"step": "1"}', '{"step": 1, "a": "b"}', "\udcff", None])
def test_metrics_that_are_none_are_refused(tmp_path, text):
    run = FakeRun(config_of(tmp_path)).run_to(2)
    path = run.checkpoints.path(2)
    if text is None:
        (path / "metrics.jsonl").unlink()
    else:
        (path / "metrics.jsonl").write_text(text, errors="surrogateescape")
    with pytest.raises(CheckpointError, match="does not hold the metrics"):
        put_back(run.run_dir, ResumePoint(path, read_state(path)), run.said.append)
