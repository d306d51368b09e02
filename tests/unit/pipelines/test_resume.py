"""Checkpoint chosen by a resume, changes allowed since then, and damaged checkpoints."""

from __future__ import annotations

import errno
import io
import json
import os
from datetime import datetime
from typing import Any

import pytest
from fake_run import FakeRun, config_of

from roll_r3.errors import BusyError, CheckpointError, ConfigError, RollError
from roll_r3.pipelines.lifecycle.resume import (
    ResumePoint,
    changes,
    opened_for_evaluation,
    rewind,
)
from roll_r3.saving.manifest import verify
from roll_r3.saving.state import read_state
from roll_r3.tracking.progress import Progress


def test_auto_goes_on_with_the_run_in_its_directory(tmp_path):
    config = config_of(tmp_path, resume_from_checkpoint="auto")
    first = FakeRun(config)
    assert first.point is None
    assert "no run in" in first.said[0]
    first.run_to(5)
    FakeRun(config_of(tmp_path), hour=2)  # a run killed before its first checkpoint
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
    (first.checkpoints.path(6) / "trainer" / "a").write_bytes(b"a" * 19_999)
    again = FakeRun(config)
    assert again.done == 4
    assert "step-00000006 is DAMAGED: trainer/a has 19999 bytes, and had 20000" in again.said[0]
    assert "step-00000006.damaged" in again.said[1]
    again.run_to(6)
    verify(again.checkpoints.path(6))


def test_what_another_process_saves_as_it_leaves_is_gone_on_from(tmp_path):
    """Look under the lock, so that no whole checkpoint is taken for damaged."""
    config = config_of(tmp_path, resume_from_checkpoint="auto")
    first = FakeRun(config).run_to(2)
    with first.run_dir.locked(print), pytest.raises(BusyError, match="another process runs in"):
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
        with pytest.raises(RollError, match=r"cannot check .*step-00000004.*it is away") as stopped:
            FakeRun(config)
    assert not isinstance(stopped.value, CheckpointError)
    assert run.checkpoints.steps() == [2, 4]
    assert FakeRun(config).done == 4


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
    with pytest.raises(ConfigError, match="cannot be resumed: it was not completed"):
        FakeRun(config_of(tmp_path, resume_from_checkpoint=str(run.checkpoints.path(4))))


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
    rewind(run.run_dir, None, run.said.append)
    assert run.run_dir.metrics_file.read_text() == run.run_dir.samples_file.read_text() == ""
    assert run.exports.steps() == []


def evaluate(run: FakeRun, step: int) -> None:
    """Write the files of an evaluation."""
    with run.run_dir.metrics_file.open("a") as stream:
        stream.write(json.dumps({"step": step, "val/a/avg@1": step / 10}) + "\n")
    with run.run_dir.validation_file.open("a") as stream:
        stream.write(json.dumps({"step": step, "set": "a"}) + "\n")


def test_an_evaluation_after_the_checkpoint_is_kept_and_a_later_one_is_not(tmp_path):
    config = config_of(tmp_path, resume_from_checkpoint="auto")
    run = FakeRun(config)
    evaluate(run, 0)
    run.run_to(4)
    evaluate(run, 4)
    run.run_to(5)
    evaluate(run, 5)
    for _ in range(2):  # a second resume finds it only once too
        again = FakeRun(config)
        assert again.done == 4
        assert again.steps_in(again.run_dir.metrics_file) == [0, 1, 2, 3, 4, 4]
        assert again.steps_in(again.run_dir.validation_file) == [0, 4]
    again.run_to(6)
    assert again.steps_in(again.checkpoints.path(6) / "metrics.jsonl") == [0, 1, 2, 3, 4, 4, 5, 6]
    other = FakeRun(config_of(tmp_path, resume_from_checkpoint=str(again.checkpoints.path(4))), hour=2)
    assert other.steps_in(other.run_dir.metrics_file) == [0, 1, 2, 3, 4], "it has to be made"


def test_samples_of_an_evaluation_without_metrics_are_dropped(tmp_path):
    config = config_of(tmp_path, resume_from_checkpoint="auto")
    run = FakeRun(config).run_to(2)
    with run.run_dir.validation_file.open("a") as stream:
        stream.write('{"step": 2, "set": "a"}\n')
    again = FakeRun(config)
    assert again.steps_in(again.run_dir.validation_file) == []


def test_a_run_that_begins_again_keeps_its_first_evaluation(tmp_path):
    run = FakeRun(config_of(tmp_path))
    evaluate(run, 0)
    run.run_to(1)
    rewind(run.run_dir, None, run.said.append)
    assert run.steps_in(run.run_dir.metrics_file) == run.steps_in(run.run_dir.validation_file) == [0]


@pytest.mark.parametrize("named", ["auto", "path", "run"])
def test_an_evaluation_alone_leaves_the_run_as_it_is(tmp_path, named):
    run = FakeRun(config_of(tmp_path)).run_to(5)
    before = run.run_dir.metrics_file.read_text()
    latest = (tmp_path / "exp" / "latest").resolve()
    name = {"auto": "auto", "path": str(run.checkpoints.path(2)), "run": str(run.run_dir.path)}[named]
    config = config_of(tmp_path, resume_from_checkpoint=name)
    with opened_for_evaluation(config, datetime(2026, 1, 2), Progress(1, io.StringIO())) as (run_dir, point):
        assert run_dir.path == tmp_path / "exp" / "evaluations" / "20260102-000000"
        assert point is not None and point.state.step == (2 if named == "path" else 4)
    assert run.run_dir.metrics_file.read_text() == before
    assert (tmp_path / "exp" / "latest").resolve() == latest
    assert FakeRun(config_of(tmp_path, resume_from_checkpoint="auto"), hour=3).run_dir == run.run_dir


def test_an_evaluation_alone_needs_a_checkpoint_or_none(tmp_path):
    now, progress = datetime(2026, 1, 2), Progress(1, io.StringIO())
    with opened_for_evaluation(config_of(tmp_path), now, progress) as (_, point):
        assert point is None, "pretrain"
    auto = config_of(tmp_path, resume_from_checkpoint="auto")
    with pytest.raises(ConfigError, match="has a checkpoint to evaluate"), opened_for_evaluation(auto, now, progress):
        pass


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
        rewind(run.run_dir, ResumePoint(path, read_state(path)), run.said.append)


def test_a_clock_that_is_set_back_does_not_choose_the_run(tmp_path):
    FakeRun(config_of(tmp_path), hour=9).run_to(4)
    newer = FakeRun(config_of(tmp_path), hour=2).run_to(2)
    again = FakeRun(config_of(tmp_path, resume_from_checkpoint="auto"), hour=3)
    assert again.run_dir == newer.run_dir
    assert (tmp_path / "exp" / "latest").resolve() == newer.run_dir.path.resolve()


def test_a_busy_run_names_the_others_and_one_of_them_goes_on_by_its_directory(tmp_path):
    killed, other = FakeRun(config_of(tmp_path)).run_to(4), FakeRun(config_of(tmp_path), hour=2).run_to(2)
    with other.run_dir.locked(print):
        with pytest.raises(BusyError, match="another process runs in") as caught:
            FakeRun(config_of(tmp_path, resume_from_checkpoint="auto"))
        assert f"resume_from_checkpoint: {killed.run_dir.path} (1 with checkpoints" in str(caught.value)
        again = FakeRun(config_of(tmp_path, resume_from_checkpoint=str(killed.run_dir.path)), hour=3)
    assert again.run_dir == killed.run_dir
    assert again.done == 4
    again.run_to(6)
    assert FakeRun(config_of(tmp_path, resume_from_checkpoint="auto")).run_dir == killed.run_dir, "it is the newest now"


def test_the_directory_of_a_run_may_be_named_by_a_link(tmp_path):
    first = FakeRun(config_of(tmp_path)).run_to(2)
    again = FakeRun(config_of(tmp_path, resume_from_checkpoint=str(tmp_path / "exp" / "latest")))
    assert again.run_dir == first.run_dir
    assert (tmp_path / "exp" / "latest").resolve() == first.run_dir.path.resolve()


def test_the_directory_of_another_experiments_run_begins_a_new_one(tmp_path):
    first = FakeRun(config_of(tmp_path)).run_to(5)
    other = FakeRun(config_of(tmp_path, exp_name="other", resume_from_checkpoint=str(first.run_dir.path)))
    assert other.run_dir.path.parent == tmp_path / "other"
    assert other.done == 4
    empty = FakeRun(config_of(tmp_path, exp_name="empty"))
    empty.checkpoints.folder.mkdir()
    with pytest.raises(ConfigError, match="a run without a checkpoint"):
        FakeRun(config_of(tmp_path, exp_name="other", resume_from_checkpoint=str(empty.run_dir.path)))


def test_a_directory_that_cannot_be_made_is_a_mistake_in_one_line(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(
        ConfigError, match=r"output_dir: .*/file: the run's directory cannot be made: .*Not a dir"
    ) as told:
        FakeRun(config_of(tmp_path / "file"))
    assert "\n" not in str(told.value)


@pytest.mark.parametrize("shares", [{}, {"a": 0.25, "b": 0.75}], ids=["all", "sections"])
@pytest.mark.parametrize("late", [0, 2])
def test_a_run_that_was_killed_draws_the_prompts_that_it_would_have_drawn(tmp_path, shares, late):
    """Kill it within step 8, after the checkpoint of step 6: prompts drawn since then are drawn again."""
    sections = {name: {"reward": "math", "tag_included": [tag]} for name, tag in (("a", "x"), ("b", "y"))}
    data = {"data_args": {"domain": "tag", "domain_interleave_probs": shares}}
    config = config_of(tmp_path, resume_from_checkpoint="auto", rewards=sections, actor_train=data)
    killed = FakeRun(config, late=late).run_to(7)
    killed.draw()
    again = FakeRun(config, late=late)
    assert again.done == 6
    again.run_to(8)
    parts = max(len(shares), 1)
    assert again.drawn == killed.drawn[6 * parts :]
    assert again.source.place == killed.source.place
    if late:
        assert len(killed.source.place.returned) == late * parts
