"""Directories of checkpoints: they appear complete, the newest are kept, damaged ones are skipped with a warning."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest

from roll_r3.errors import CheckpointError
from roll_r3.saving.manifest import file_sum
from roll_r3.saving.store import CHECKPOINTS, Store, mark_newest, newest_run, runs_saved


def save(store: Store, step: int) -> Path:
    folder = store.begin(step)
    (folder / "weights").write_text(f"of step {step}")
    store.seal(step, {"weights": file_sum(folder / "weights")})
    return store.finish(step)


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "run" / CHECKPOINTS)


def test_a_checkpoint_gets_its_name_when_complete(store):
    folder = store.begin(3)
    assert store.steps() == []
    (folder / "weights").write_text("x")
    assert store.newest_intact(print) is None
    store.seal(3, {"weights": file_sum(folder / "weights")})
    assert store.steps() == []
    path = store.finish(3)
    assert path.name == "step-00000003"
    assert store.steps() == [3]
    assert store.newest_intact(print) == path
    with pytest.raises(CheckpointError, match="exists already"):
        store.begin(3)


def test_leftovers_of_a_dead_process_are_removed_by_the_next_save(store):
    (store.begin(3) / "half").write_text("x")
    (store.folder / ".step-00000001.removed").mkdir()
    save(store, 4)
    assert [entry.name for entry in store.folder.iterdir()] == ["step-00000004"]


def test_a_failed_save_leaves_nothing(store):
    save(store, 1)
    (store.begin(2) / "half").write_text("x")
    store.abandon(2)
    store.abandon(7)
    assert [entry.name for entry in store.folder.iterdir()] == ["step-00000001"]


def test_the_newest_are_kept(store):
    for step in (2, 4, 6, 100):
        save(store, step)
    store.keep(0)
    assert store.steps() == [2, 4, 6, 100]
    store.keep(2)
    assert store.steps() == [6, 100]
    store.keep(5)
    assert store.steps() == [6, 100]
    assert len(list(store.folder.iterdir())) == 2


def test_a_partly_removed_directory_is_not_a_checkpoint(store, monkeypatch):
    for step in (1, 2):
        save(store, step)

    def fail(path: Path) -> None:
        raise OSError("stale file handle")

    monkeypatch.setattr("roll_r3.saving.store.shutil.rmtree", fail)
    with pytest.raises(OSError, match="stale"):
        store.keep(1)
    monkeypatch.undo()
    assert store.steps() == [2]
    assert store.newest_intact(print) == store.path(2)
    save(store, 3)
    assert sorted(entry.name for entry in store.folder.iterdir()) == ["step-00000002", "step-00000003"]


def test_steps_are_numbers_not_names(store):
    for step in (99_999_999, 100_000_000, 5):
        save(store, step)
    (store.folder / "step-5").mkdir()
    (store.folder / "notes").touch()
    assert store.steps() == [5, 99_999_999, 100_000_000]


def test_a_damaged_checkpoint_is_skipped_with_a_warning(store):
    for step in (1, 2, 3):
        save(store, step)
    (store.path(3) / "weights").write_text("of step 7")
    (store.path(2) / "complete").unlink()
    messages: list[str] = []
    assert store.newest_intact(messages.append) == store.path(1)
    assert "step-00000003 is DAMAGED: weights does not match its checksum" in messages[0]
    assert "step-00000002 is DAMAGED: it was not completed" in messages[1]
    aside = store.set_aside_after(1, "damaged")
    assert [path.name for path in aside] == ["step-00000002.damaged", "step-00000003.damaged"]
    assert store.steps() == [1]
    save(store, 2)
    save(store, 3)
    assert store.newest_intact(messages.append) == store.path(3)
    assert len(messages) == 2


def test_only_damaged_checkpoints_are_an_error(store):
    save(store, 1)
    (store.path(1) / "weights").unlink()
    with pytest.raises(CheckpointError, match=r"every checkpoint in .* is damaged"):
        store.newest_intact(print)


def test_the_newest_run_with_a_checkpoint_is_found(tmp_path):
    assert newest_run(tmp_path / "nowhere") is None
    for run in ("20261121-120000", "20261121-120000-2", "20261121-120000-10", "20261121-130000", "20261120-235959"):
        (tmp_path / run).mkdir()
    assert newest_run(tmp_path) is None
    save(Store(tmp_path / "20261120-235959" / CHECKPOINTS), 9)
    assert newest_run(tmp_path) == "20261120-235959"
    for run in ("20261121-120000-10", "20261121-120000", "20261121-120000-2"):
        save(Store(tmp_path / run / CHECKPOINTS), 1)
    (tmp_path / "latest").symlink_to("20261120-235959")
    for copied in (
        "20261121-120000-10.bak",
        "20261121-120000-10 (copy 2)",
        "20261122-120000.old",
        "kept-20261122-120000",
    ):
        save(Store(tmp_path / copied / CHECKPOINTS), 1)
    assert newest_run(tmp_path) == "20261121-120000-10", "no copy that somebody made"


def test_renamed_checkpoints_stay(store):
    for attempt in range(3):
        save(store, 4)
        (store.path(4) / "attempt").write_text(str(attempt))
        assert len(store.set_aside_after(3, "damaged")) == 1
    kept = {path.name: (path / "attempt").read_text() for path in store.folder.glob("step-*")}
    assert kept == {"step-00000004.damaged": "0", "step-00000004.damaged-2": "1", "step-00000004.damaged-3": "2"}
    assert store.steps() == []


def test_the_run_started_last_is_the_newest_for_any_clock(tmp_path):
    """Clocks and time zones may change between runs."""
    for run in ("20261121-210000", "20261121-120000", "20261121-120000-1"):
        save(Store(tmp_path / run / CHECKPOINTS), 1)
    assert newest_run(tmp_path) == "20261121-210000", "of an earlier release, by its name"
    mark_newest(tmp_path / "20261121-120000")
    assert newest_run(tmp_path) == "20261121-120000"
    mark_newest(tmp_path / "20261121-120000-1")
    mark_newest(tmp_path / "20261121-120000-1")
    assert newest_run(tmp_path) == "20261121-120000-1"
    mark_newest(tmp_path / "20261121-210000")
    assert newest_run(tmp_path) == "20261121-210000", "it went on"
    assert runs_saved(tmp_path) == ["20261121-120000", "20261121-120000-1", "20261121-210000"]


@pytest.mark.parametrize("text", ["", "x", "-3", "9" * 100, "\u0663", "1e3"])
def test_an_invalid_number_is_ignored(tmp_path, text):
    for run in ("20261121-210000", "20261121-120000"):
        save(Store(tmp_path / run / CHECKPOINTS), 1)
    (tmp_path / "20261121-120000" / ".order").write_text(text)
    assert newest_run(tmp_path) == "20261121-210000"


def test_a_trial_leaves_nothing_and_fails_where_a_save_would(store, monkeypatch):
    save(store, 1)
    store.try_out()
    assert [path.name for path in store.folder.iterdir()] == ["step-00000001"]

    def refuses(folder: Path) -> None:
        raise OSError(errno.EINVAL, "Invalid argument", str(folder))

    monkeypatch.setattr("roll_r3.saving.store.sync_directory", refuses)
    with pytest.raises(OSError, match="Invalid argument"):
        store.try_out()
    assert [path.name for path in store.folder.iterdir()] == ["step-00000001"]
