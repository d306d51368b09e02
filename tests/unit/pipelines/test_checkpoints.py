"""Contents and times of a run's saves, and its behaviour on a full disk or a request to stop.

The trainer is a stand-in with two files in the place of tensors; real ones are tested with the trainers.
"""

from __future__ import annotations

import errno
import os
import re
import resource
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from threading import Timer
from typing import Any

import pytest
from fake_run import FakeRun, config_of

from roll_r3.config.reading.yaml_file import to_yaml
from roll_r3.errors import CheckpointError, LostWorkerError
from roll_r3.pipelines.lifecycle.checkpoints import lacks_export, try_saving
from roll_r3.pipelines.lifecycle.shutdown import GracefulExit, ImmediateExit
from roll_r3.saving.manifest import verify
from roll_r3.saving.state import read_state


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


def test_an_export_that_was_due_when_a_run_ended_is_made_by_the_next(tmp_path):
    config = config_of(tmp_path, save_hf_steps=5, resume_from_checkpoint="auto", max_steps=10)
    run = FakeRun(config).run_to(9)
    run.done = 10

    def full(path: Path) -> dict[str, int]:
        raise CheckpointError("No space left on device")

    run.trainer.save_hf = full
    with pytest.raises(CheckpointError, match=r"step 10 was not exported: No space left on device\n") as stopped:
        run.saving.step_done(10, 320, run.source.place)
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


@contextmanager
def files_up_to(size: int) -> Iterator[None]:
    """Limit the size of files, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("size", [16_384, 24_000], ids=["trainer", "configuration"])
def test_a_full_disk_stops_the_run_and_leaves_what_was_saved(tmp_path, size):
    config = config_of(tmp_path, resume_from_checkpoint="auto", max_ckpt_to_keep=1)
    if size == 24_000:
        config = config.model_copy(update={"rewards": {f"rule{i}": config.rewards["default"] for i in range(400)}})
    run = FakeRun(config).run_to(3)
    with files_up_to(size), pytest.raises(CheckpointError, match=r"step 4 was not saved: .*File too large") as stopped:
        run.saving.step_done(4, 128, run.source.place)
    assert re.search(r"\(disk: /\S* \(\d+ of \d+ MB are free\)\)$", str(stopped.value))
    assert "there is step 2" in str(stopped.value)
    assert [entry.name for entry in run.checkpoints.folder.iterdir()] == ["step-00000002"]
    verify(run.checkpoints.path(2))
    again = FakeRun(config).run_to(4)
    assert again.checkpoints.steps() == [4]


def beside(tmp_path: Path, **changed: Any) -> FakeRun:
    """Return a run that writes its checkpoints beside its steps."""
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
    run.saving.step_done(6, 192, run.source.place)
    Timer(0.3, run.trainer.may_write.set).start()
    run.saving.step_done(10, 320, run.source.place)
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
    [(LostWorkerError("an engine's node"), LostWorkerError), (None, GracefulExit)],
    ids=["loss", "no error"],
)
def test_sigterm_at_the_end_of_a_run_waits_for_what_is_being_written(tmp_path, error, raised):
    run = beside(tmp_path)
    run.trainer.may_write.clear()

    def end() -> None:
        with run.shutdown, run.saving:
            run.run_to(2)
            Timer(0.2, os.kill, (os.getpid(), signal.SIGTERM)).start()
            Timer(0.5, run.trainer.may_write.set).start()
            if error:
                raise error

    with pytest.raises(raised):
        end()
    assert run.shutdown.asked
    verify(run.checkpoints.path(2))


@pytest.mark.parametrize("at_once", [ImmediateExit(), KeyboardInterrupt()], ids=["SIGTERM again", "Ctrl-C"])
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
    run.run_to(2).saving.leave(2, 64, run.source.place)
    assert run.trainer.calls == ["snapshot", "written"]
    run.run_to(3).saving.leave(3, 96, run.source.place)
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

    with (
        files_up_to(16_384),
        pytest.raises(CheckpointError, match=r"step 4 was not saved: .*File too large") as stopped,
    ):
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

    with files_up_to(16_384), pytest.raises(RuntimeError, match="the engine died"):
        end()
    assert "step 2 was not saved: " in run.said[-1]


def test_what_is_left_is_saved_once(tmp_path):
    run = FakeRun(config_of(tmp_path, save_steps=3)).run_to(5)
    run.saving.leave(5, 160, run.source.place)
    run.saving.leave(5, 160, run.source.place)
    assert run.checkpoints.steps() == [3, 5]
    verify(run.checkpoints.path(5))
    again = FakeRun(config_of(tmp_path, resume_from_checkpoint="auto"))
    again.saving.leave(5, 160, again.source.place)
    assert again.checkpoints.steps() == [3, 5], "nothing was done since"
    none = FakeRun(config_of(tmp_path / "none", save_steps=0)).run_to(2)
    none.saving.leave(2, 64, none.source.place)
    assert none.checkpoints.steps() == []
    assert none.said == ["nothing is saved: save_steps is 0"]


@pytest.mark.parametrize("async_save", [False, True])
def test_a_lost_worker_while_saving_is_no_full_disk(tmp_path, async_save):
    """Resume from an older checkpoint without help: nothing is in the way."""
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


def test_a_disk_on_which_nothing_can_be_saved_is_found_before_the_first_step(tmp_path, monkeypatch):
    run = FakeRun(config_of(tmp_path))
    try_saving(run.config, run.run_dir)
    assert list(run.checkpoints.folder.iterdir()) == []

    def refuses(folder: Path) -> None:
        raise OSError(errno.EINVAL, "Invalid argument", str(folder))

    monkeypatch.setattr("roll_r3.saving.store.sync_directory", refuses)
    with pytest.raises(
        CheckpointError, match=r"nothing could be saved in .*/checkpoints, so no step is made.*Invalid arg"
    ):
        try_saving(run.config, run.run_dir)
    try_saving(config_of(tmp_path, save_steps=0), run.run_dir)
