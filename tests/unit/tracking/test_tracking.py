"""Metrics, progress, summary and directory of a run."""

from __future__ import annotations

import errno
import io
import json
import logging
import threading
from datetime import datetime
from pathlib import Path
from types import SimpleNamespace

import pytest

from roll_r3.errors import BusyError
from roll_r3.tracking.metric_log import MetricLog, evaluated_steps, last_step
from roll_r3.tracking.names import METRICS, declared_order, metrics_page
from roll_r3.tracking.progress import Progress, format_seconds
from roll_r3.tracking.run_dir import RunDir
from roll_r3.tracking.run_log import RunLog, log_threads
from roll_r3.tracking.run_summary import evaluation_table, run_summary

NOW = datetime(2026, 11, 21, 12, 0, 0)


def test_latest_points_at_the_newest_run(tmp_path):
    first = RunDir.create(str(tmp_path), "exp", NOW)
    second = RunDir.create(str(tmp_path), "exp", NOW)
    assert first.path != second.path, "two runs in one second"
    assert (tmp_path / "exp" / "latest").resolve() == second.path.resolve()


def test_metrics_are_written_in_declared_order_and_kept(tmp_path):
    run_dir = RunDir.create(str(tmp_path), "exp", NOW)
    with MetricLog(run_dir, ["tensorboard"]) as log:
        log.write(1, {"critic/score/mean": 0.5, "actor/lr": float("nan")})
        with pytest.raises(KeyError, match="actor/typo"):
            log.write(2, {"actor/typo": 1.0})
    lines = [json.loads(x) for x in run_dir.metrics_file.read_text().splitlines()]
    assert lines == [{"step": 1, "critic/score/mean": 0.5, "actor/lr": None}]
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    board = EventAccumulator(str(run_dir.path / "tensorboard")).Reload()
    assert board.Scalars("critic/score/mean")[0].value == 0.5


def test_a_resumed_run_appends_its_metrics(tmp_path):
    """On the board too, repeated steps replace lost ones."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run_dir = RunDir.create(str(tmp_path), "exp", NOW)
    with MetricLog(run_dir, ["tensorboard"]) as log:
        for step, score in ((1, 0.1), (2, 0.25), (3, 0.5)):
            log.write(step, {"critic/score/mean": score, "actor/lr": float("nan")})
    lines = run_dir.metrics_file.read_text().splitlines(keepends=True)
    run_dir.metrics_file.write_text("".join(lines[:2]))
    with MetricLog(RunDir.reopen(str(tmp_path), "exp", run_dir.path.name), ["tensorboard"]) as log:
        assert [row["critic/score/mean"] for row in log.history] == [0.1, 0.25]
        log.write(3, {"critic/score/mean": 0.75})
    assert run_dir.metrics_file.read_text().splitlines(keepends=True)[:2] == lines[:2]
    assert json.loads(run_dir.metrics_file.read_text().splitlines()[2]) == {"step": 3, "critic/score/mean": 0.75}
    board = EventAccumulator(str(run_dir.path / "tensorboard")).Reload()
    assert [(event.step, round(event.value, 2)) for event in board.Scalars("critic/score/mean")] == [
        (1, 0.1),
        (2, 0.25),
        (3, 0.75),
    ]


def test_a_restarted_run_shows_the_new_steps_alone(tmp_path):
    """A worker was lost before anything was saved."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run_dir = RunDir.create(str(tmp_path), "exp", NOW)
    with MetricLog(run_dir, ["tensorboard"]) as log:
        for step in (1, 2, 3):
            log.write(step, {"critic/score/mean": 0.5})
    run_dir.metrics_file.write_text("")
    with MetricLog(run_dir, ["tensorboard"]) as log:
        log.write(1, {"critic/score/mean": 0.75})
    board = EventAccumulator(str(run_dir.path / "tensorboard")).Reload()
    assert [(event.step, event.value) for event in board.Scalars("critic/score/mean")] == [(1, 0.75)]


def test_a_new_run_that_begins_with_metrics_shows_them(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run_dir = RunDir.create(str(tmp_path), "exp", NOW)
    run_dir.metrics_file.write_text('{"step": 4, "critic/score/mean": 0.5, "actor/lr": null}\n')
    with MetricLog(run_dir, ["tensorboard"]) as log:
        log.write(5, {"critic/score/mean": 0.75})
    board = EventAccumulator(str(run_dir.path / "tensorboard")).Reload()
    assert [(event.step, event.value) for event in board.Scalars("critic/score/mean")] == [(4, 0.5), (5, 0.75)]


def test_one_process_at_a_time_runs_in_a_directory(tmp_path):
    run_dir = RunDir.create(str(tmp_path), "exp", NOW)
    again = RunDir.reopen(str(tmp_path), "exp", run_dir.path.name)
    messages: list[str] = []
    with run_dir.locked(print), pytest.raises(BusyError, match="another process runs in"), again.locked(print):
        pass
    with again.locked(messages.append):
        pass
    assert messages == []


def test_the_directory_on_another_disk_is_locked_too(tmp_path):
    """Two runs with different directories may share the directory of checkpoints."""
    disk = str(tmp_path / "disk")
    first = RunDir.create(str(tmp_path / "a"), "exp", NOW, saving_dir=disk)
    second = RunDir.create(str(tmp_path / "b"), "exp", NOW, saving_dir=disk)
    assert first.saved.parent == second.saved.parent == tmp_path / "disk" / "exp"
    assert first.saved != second.saved
    again = RunDir.reopen(str(tmp_path / "c"), "exp", first.saved.name, saving_dir=disk)
    busy = f"another process runs in {first.saved}"
    with first.locked(print), pytest.raises(BusyError, match=busy), again.locked(print):
        pass


def test_a_disk_without_locks_is_reported(tmp_path, monkeypatch):
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr("fcntl.flock", refuse)
    messages: list[str] = []
    with RunDir.create(str(tmp_path), "exp", NOW).locked(messages.append):
        pass
    assert len(messages) == 1 and "has no locks (Function not implemented)" in messages[0]


def test_a_missing_directory_is_made_again(tmp_path):
    run_dir = RunDir.reopen(str(tmp_path), "exp", "20261121-120000")
    assert run_dir.log_file("driver").parent.is_dir()
    assert (tmp_path / "exp" / "latest").resolve() == run_dir.path.resolve()


def test_plain_lines_without_a_terminal():
    out = io.StringIO()
    with Progress(20, out) as progress:
        with progress.stage("starting Ray"):
            pass
        with progress.stage("rollout", 1):
            pass
        progress.step_done(1, {"time/step_total": 2.0, "system/tps": 1000.0, "critic/score/mean": 0.25})
    text = out.getvalue()
    assert "starting Ray ..." in text
    assert "rollout" not in text, "stages of a step are for the live line"
    assert "1/20" in text
    assert "0.2500" in text
    assert "0:38" in text, "19 steps of 2 s are left"


class Broken(io.StringIO):
    """Stream of a reader that left after some lines."""

    def __init__(self, lines: int, error: OSError) -> None:
        super().__init__()
        self.lines, self.error = lines, error

    def write(self, text: str) -> int:
        self.lines -= text.count("\n")
        if self.lines < 0:
            raise self.error
        return super().write(text)


@pytest.mark.parametrize("error", [BrokenPipeError(32, "Broken pipe"), OSError(5, "Input/output error")], ids=repr)
def test_progress_is_logged_after_the_loss_of_the_terminal(caplog, error):
    caplog.set_level("INFO")
    out = Broken(1, error)
    with Progress(20, out) as progress:
        for text in ("read", "lost", "logged"):
            progress.say(text)
    assert out.getvalue() == "read\n"
    assert [record.getMessage() for record in caplog.records] == [
        f"terminal lost ({error}); progress continues in this log",
        "lost",
        "logged",
    ]


def test_remaining_time_uses_the_last_ten_steps():
    """A run resumed after step 80 has not timed the steps before it."""
    progress = Progress(100, io.StringIO())
    for step in range(81, 96):
        progress.step_done(step, {"time/step_total": 60.0 if step < 86 else 2.0, "system/tps": 1.0})
    with progress.stage("rollout", 96):
        cells = [str(cell) for column in progress._render().columns for cell in column.cells]
    assert cells[-1] == "about 0:10 left"
    assert len(progress._step_times) == 10, "a run may make any number of steps"


def test_a_figure_of_any_size_keeps_to_its_column():
    out = io.StringIO()
    with Progress(20, out) as progress:
        for value in (0.5, 123.4, -7.8e36, float("nan")):
            progress.step_done(1, {"critic/score/mean": value, "time/step_total": 1.0, "system/tps": 1.0})
    cells = [line[9:20] for line in out.getvalue().splitlines()[1:]]
    assert cells == ["     0.5000", "      123.4", "   -7.8e+36", "        nan"]


def test_seconds_for_people():
    assert [format_seconds(s) for s in (5, 95, 3700)] == ["0:05", "1:35", "1:01:40"]


def test_only_metrics_of_the_summary_are_kept(tmp_path):
    run_dir = RunDir.create(str(tmp_path), "exp", NOW)
    row = dict.fromkeys(METRICS, 0.5)
    with MetricLog(run_dir, []) as log:
        log.write(1, row)
        kept = log.history
        assert len(kept[0]) < len(row) / 3
        whole, short = (
            run_summary(Path("/runs/x"), history, [], [], replay_mode="R3", seconds=1) for history in ([row], kept)
        )
    assert short == whole
    with MetricLog(run_dir, []) as log:
        assert log.history == kept


def test_an_evaluation_is_a_line_of_its_own_and_no_step(tmp_path):
    run_dir = RunDir.create(str(tmp_path), "exp", NOW)
    with MetricLog(run_dir, []) as log:
        log.write_evaluation(0, {"val/aime/pass@1": 0.25, "time/step_evaluation": 2.0})
        log.write(1, {"critic/score/mean": 0.5})
        log.write_evaluation(1, {"val/aime/pass@1": 0.5, "time/step_evaluation": 2.0})
        with pytest.raises(KeyError, match="val/aime/typo"):
            log.write_evaluation(1, {"val/aime/typo": 0.5})
    broken = '[1]\n{"val/aime/pass@1": 1}\n{"step": null, "val/x/avg@1": 1}\n{"step": 2, "val/ai'
    assert evaluated_steps(run_dir.metrics_file.read_text() + broken) == {0, 1}
    assert last_step(run_dir.metrics_file) == 1
    with MetricLog(run_dir, []) as again:
        assert again.history == log.history == [{"critic/score/mean": 0.5}]
        assert again.evaluations == log.evaluations == {0: {"val/aime/pass@1": 0.25}, 1: {"val/aime/pass@1": 0.5}}


def test_the_board_has_the_evaluation_before_the_first_step_once(tmp_path):
    """A worker was lost in the first step, before a checkpoint."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run_dir = RunDir.create(str(tmp_path), "exp", NOW)
    for value in (0.25, 0.5):
        run_dir.metrics_file.unlink(missing_ok=True)
        with MetricLog(run_dir, ["tensorboard"]) as log:
            log.write_evaluation(0, {"val/aime/pass@1": value})
    board = EventAccumulator(str(run_dir.path / "tensorboard")).Reload()
    assert [(event.step, event.value) for event in board.Scalars("val/aime/pass@1")] == [(0, 0.5)]


def test_the_summary_has_the_first_and_the_last_evaluation_by_set():
    evaluations = {
        0: {"val/aime/avg@2": 0.25, "val/gsm/avg@2": 0.1},
        5: {"val/aime/avg@2": 0.3, "val/gsm/avg@2": 0.2},
        10: {
            "val/aime/avg@2": 0.5,
            "val/gsm/avg@2": 0.75,
            "val/aime/pass@2": 1.0,
            "val/aime/prompts": 30.0,
            "val/aime/algebra/avg@2": 0.5,
        },
    }
    text = run_summary(Path("/runs/x"), [], [], [], evaluations=evaluations, replay_mode="R3", seconds=61)
    lines = [" ".join(line.split()) for line in text.splitlines()]
    start = lines.index("evaluation after step 0 -> after step 10")
    assert lines[start + 1 : start + 5] == [
        "aime/avg@2 0.2500 -> 0.5000",
        "aime/pass@2 ? -> 1.0000",
        "gsm/avg@2 0.1000 -> 0.7500",
        "router replay R3",
    ]
    assert "val/aime/algebra/avg@2  0.5" in evaluation_table(evaluations[10])


def test_the_summary_has_directory_rewards_and_replay():
    history = [{"critic/score/mean": i / 10, "router_replay/coverage": 1.0} for i in range(11)]
    sample = SimpleNamespace(prompt="1+1=", response="2", ground_truth="2", score=1.0)
    text = run_summary(Path("/runs/x"), history, [sample], [sample], replay_mode="R3", seconds=61)
    assert "/runs/x" in text
    assert "0.200 (first 5 steps) -> 0.800 (last 5 steps)" in text
    assert "coverage" in text
    assert "wanted '2'" in text


def test_a_family_declares_the_metrics_of_every_name():
    given = ["system/tps", "reward/rule/b/c", "reward/rule/a d", "reward/rule/", "reward/rules/a", "critic/score/mean"]
    declared, unknown = declared_order(given)
    assert declared == ["critic/score/mean", "reward/rule/a d", "reward/rule/b/c", "system/tps"]
    assert unknown == ["reward/rule/", "reward/rules/a"]


def test_docs_of_metrics_are_fresh():
    path = Path(__file__).parents[3] / "docs" / "metrics.md"
    assert path.read_text() == metrics_page(), "run python -m roll_r3.tracking.names"
    assert all(m.unit and m.meaning for m in METRICS.values())


FULL = Path("/dev/full")
"""Device on which every write fails as on a full disk."""
needs_full = pytest.mark.skipif(not FULL.exists(), reason="this system has none")


@needs_full
def test_a_log_on_a_full_disk_is_reported_once_without_traceback(capsys):
    messages: list[str] = []
    log, logger = RunLog(FULL, messages.append), logging.getLogger("of a test")
    logger.addHandler(log)
    try:
        for _ in range(3):
            logger.warning("a line")
    finally:
        logger.removeHandler(log)
    assert messages == ["the log cannot be written: [Errno 28] No space left on device: '/dev/full'"]
    assert capsys.readouterr().err == ""


def test_the_error_of_a_thread_is_logged_only(monkeypatch, capsys, caplog):
    monkeypatch.setattr(threading, "excepthook", threading.excepthook)  # put back afterwards
    log_threads()
    thread = threading.Thread(target=open, args=("/nowhere/events",), name="writer")
    thread.start()
    thread.join()
    [record] = caplog.records
    assert record.getMessage() == "writer ended"
    assert isinstance(record.exc_info[1], FileNotFoundError)
    assert capsys.readouterr().err == ""


@needs_full
def test_a_full_disk_names_the_metrics_file(tmp_path):
    run_dir = RunDir.create(str(tmp_path), "exp", NOW)
    run_dir.metrics_file.symlink_to(FULL)
    with pytest.raises(OSError, match=r"No space left on device: '.*/metrics.jsonl'"), MetricLog(run_dir, []) as log:
        log.write(1, {"critic/score/mean": 0.5})
