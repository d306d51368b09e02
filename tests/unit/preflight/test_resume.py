"""Quick check of the checkpoint to resume from."""

from __future__ import annotations

from pathlib import Path

import pytest

from roll_r3.preflight.files import resume_problem
from roll_r3.saving.manifest import file_sum, seal
from roll_r3.saving.state import STATE, Data, RunState
from roll_r3.saving.store import CHECKPOINTS


@pytest.fixture
def checkpoint(tmp_path):
    path = tmp_path / "step-00000004"
    path.mkdir()
    data = Data(prompts=1, sha256="a" * 64, seed=1, drawn=((4, 1),))
    (path / STATE).write_text(RunState(step=4, samples_seen=4, trainer="fsdp2_train", data=data).text())
    seal(path, {STATE: file_sum(path / STATE)})
    return path


def test_a_complete_checkpoint_has_no_problem(checkpoint):
    for name in ("off", "auto", str(checkpoint)):
        assert resume_problem(name) == ""


def test_anything_but_a_checkpoint_is_refused(checkpoint, tmp_path):
    assert "is not a directory" in resume_problem(str(tmp_path / "nowhere"))
    assert "is not a directory" in resume_problem(str(checkpoint / STATE))
    assert "has no file 'complete'" in resume_problem(str(tmp_path))
    assert resume_problem("a\0b")
    (checkpoint / STATE).write_text("{")
    assert "is not a valid training state" in resume_problem(str(checkpoint))
    (checkpoint / "complete").unlink()
    assert "is not a complete checkpoint" in resume_problem(str(checkpoint))


def test_a_run_with_a_checkpoint_can_be_named_by_its_directory(checkpoint: Path, tmp_path: Path) -> None:
    step = tmp_path / "run" / CHECKPOINTS / "step-00000003"
    step.parent.mkdir(parents=True)
    assert "a run without a checkpoint" in resume_problem(str(tmp_path / "run"))
    checkpoint.rename(step)
    assert resume_problem(str(tmp_path / "run")) == ""
