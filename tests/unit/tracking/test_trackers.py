"""Trackers: failures and delays stay with them; each library for real where it is installed."""

from __future__ import annotations

import json
import math
import sqlite3
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest

from roll_r3.config.pipeline import RLVRConfig
from roll_r3.tracking.metric_log import MetricLog
from roll_r3.tracking.run_dir import RunDir
from roll_r3.tracking.trackers import background
from roll_r3.tracking.trackers.background import BackgroundTracker
from roll_r3.tracking.trackers.base import Row, TrackedRun
from roll_r3.tracking.trackers.libraries import LIBRARIES, without_secrets

NOW = datetime(2026, 11, 21, 12, 0, 0)
METRICS = {"critic/score/mean": 0.5, "actor/lr": math.nan}


class Recorder:
    """Tracker that fails where asked."""

    def __init__(self, *, fails: str = "", continues: bool = False, slow: threading.Event | None = None) -> None:
        self.fails, self.continues, self.slow = fails, continues, slow
        self.calls: list[tuple[Any, ...]] = []

    def start(self, run: TrackedRun, kwargs: Mapping[str, Any]) -> Recorder:
        self._do("start", dict(kwargs))
        return self

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        self._do("log", step)

    def log_samples(self, step: int, name: str, rows: Sequence[Row]) -> None:
        self._do("log_samples", step, name, len(rows))

    def close(self) -> None:
        self._do("close")

    def _do(self, *call: Any) -> None:
        if self.slow is not None:
            self.slow.wait(20)
        if call[0] == self.fails:
            raise ConnectionError("no network\nand much more")
        self.calls.append(call)


def tracked(recorder: Recorder, directory: Path, said: list[str], earlier: Any = None) -> BackgroundTracker:
    run = TrackedRun(directory, {}, earlier or {})
    return BackgroundTracker("wandb", recorder.start, run, {"project": "x"}, said.append)


def test_calls_arrive_in_order(tmp_path: Path) -> None:
    recorder, said = Recorder(), list[str]()
    tracker = tracked(recorder, tmp_path, said, {1: METRICS, 2: METRICS})
    tracker.log(3, METRICS)
    tracker.log_samples(3, "samples", [{"a": 1}])
    tracker.log_samples(3, "samples", [])
    tracker.close(20)
    assert recorder.calls == [
        ("start", {"project": "x"}),
        ("log", 1),
        ("log", 2),
        ("log", 3),
        ("log_samples", 3, "samples", 1),
        ("close",),
    ]
    assert said == []


def test_a_tracker_with_the_earlier_steps_does_not_get_them_again(tmp_path: Path) -> None:
    recorder = Recorder(continues=True)
    tracked(recorder, tmp_path, [], {1: METRICS}).close(20)
    assert recorder.calls == [("start", {"project": "x"}), ("close",)]


@pytest.mark.parametrize("fails", ["start", "log", "log_samples", "close"])
def test_a_failure_is_said_once_and_turns_it_off(tmp_path: Path, fails: str) -> None:
    recorder, said = Recorder(fails=fails), list[str]()
    tracker = tracked(recorder, tmp_path, said)
    for step in (1, 2, 3):
        tracker.log(step, METRICS)
        tracker.log_samples(step, "samples", [{"a": 1}])
    tracker.close(20)
    assert said == [
        "tracker wandb is off from here, the run goes on: ConnectionError: no network (more in logs/driver.log)"
    ]
    if fails != "close":
        assert ("log", 2) not in recorder.calls


def test_a_library_that_hangs_keeps_nobody_waiting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(background, "WAITING", 5)
    free = threading.Event()
    recorder, said = Recorder(slow=free), list[str]()
    tracker = tracked(recorder, tmp_path, said)
    began = time.monotonic()
    for step in range(10):
        tracker.log(step, METRICS)
    tracker.close(0.2)
    assert time.monotonic() - began < 5
    assert said == ["tracker wandb is off from here, the run goes on: 5 calls wait for it (more in logs/driver.log)"]
    free.set()


def test_the_end_waits_for_a_while_only(tmp_path: Path) -> None:
    free, said = threading.Event(), list[str]()
    tracked(Recorder(slow=free), tmp_path, said).close(0.1)
    assert said == [
        "tracker wandb is off from here, the run goes on: it did not end within 0.1 s (more in logs/driver.log)"
    ]
    free.set()


def test_a_library_that_is_missing_costs_the_run_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    run_dir, said = RunDir.create(str(tmp_path), "exp", NOW), list[str]()
    with MetricLog(run_dir, ["wandb"], say=said.append) as log:
        log.write(1, METRICS)
    assert len(said) == 1 and said[0].startswith("tracker wandb is off from here, the run goes on: ")
    assert json.loads(run_dir.metrics_file.read_text())["critic/score/mean"] == 0.5


def test_every_tracker_of_the_configuration_has_a_library_and_an_extra() -> None:
    import tomllib

    names = RLVRConfig.model_fields["track_with"].annotation.__args__[0].__args__
    assert set(names) == set(LIBRARIES)
    text = (Path(__file__).parents[3] / "pyproject.toml").read_text()
    extras = tomllib.loads(text)["project"]["optional-dependencies"]
    for library in LIBRARIES.values():
        assert any(requirement.startswith(library.package) for requirement in extras[library.extra])
        assert library.load() is not None


def test_the_configuration_that_is_shown_has_no_secrets() -> None:
    config = RLVRConfig(
        exp_name="x",
        pretrain="p",
        actor_train={},
        actor_infer={},
        system_envs={"TOKEN": "abc"},
        tracker_kwargs={"wandb": {"project": "abc"}},
    )
    shown = without_secrets(config)
    assert shown["system_envs"] == {"TOKEN": "<hidden>"}
    assert "abc" not in json.dumps(shown)
    assert shown["exp_name"] == "x"


SAMPLES = [{"prompt": "1+1=", "response": "2\n", "score": 1.0, "domain": None, "parts": {"math": 1.0}}]


def two_starts(tmp_path: Path, tracker: str, **kwargs: Any) -> RunDir:
    """Log steps 0 to 3, resume after step 2, and log steps 3 and 4."""
    said: list[str] = []
    run_dir = RunDir.create(str(tmp_path / "runs"), "exp", NOW)
    given = {"kwargs": {tracker: kwargs}, "config": {"seed": 1, "rewards": {"a": {"tags": ["x"]}}}, "say": said.append}
    with MetricLog(run_dir, [tracker], **given) as log:
        log.write_evaluation(0, {"val/aime/pass@2": 0.25})
        for step in (1, 2, 3):
            log.write(step, METRICS)
            log.write_samples(step, "samples", SAMPLES)
    lines = run_dir.metrics_file.read_text().splitlines(keepends=True)
    run_dir.metrics_file.write_text("".join(lines[:3]))
    with MetricLog(run_dir, [tracker], **given) as log:
        log.write(3, METRICS | {"critic/score/mean": 0.75})
        log.write(4, METRICS)
    assert said == []
    return run_dir


def test_wandb_for_real_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    run_dir = two_starts(tmp_path, "wandb", tags=("moe", "r3"))
    [run_id] = (run_dir.path / "trackers" / "wandb-run-id").read_text().split()
    files = sorted(run_dir.path.glob("wandb/offline-run-*/run-*.wandb"))
    assert files and {file.stem for file in files} == {f"run-{run_id}"}, "both starts are one run"
    text = b"".join(file.read_bytes() for file in files)
    assert b"val/aime/pass@2" in text and b"critic/score/mean" in text
    assert list(run_dir.path.glob("wandb/offline-run-*/files/media/table/samples*"))


def test_wandb_without_a_key_asks_nobody(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb")
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    said: list[str] = []
    kwargs = {"wandb": {"mode": "online"}}
    with MetricLog(RunDir.create(str(tmp_path), "exp", NOW), ["wandb"], kwargs=kwargs, say=said.append) as log:
        log.write(1, METRICS)
    assert len(said) == 1 and "there is no key: set WANDB_API_KEY, or WANDB_MODE=offline" in said[0]


def test_mlflow_for_real(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mlflow = pytest.importorskip("mlflow")
    pytest.importorskip("sqlalchemy")
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    monkeypatch.chdir(tmp_path)  # for the artifacts
    run_dir = two_starts(tmp_path, "mlflow", description="moe")
    client = mlflow.MlflowClient(uri)
    [found] = client.search_runs([client.get_experiment_by_name("exp").experiment_id])
    assert found.info.run_name == run_dir.path.name
    assert found.info.run_id == (run_dir.path / "trackers" / "mlflow-run-id").read_text().strip()
    assert found.info.status == "FINISHED"
    points = client.get_metric_history(found.info.run_id, "critic/score/mean")
    assert [(p.step, p.value) for p in points] == [(1, 0.5), (2, 0.5), (3, 0.5), (3, 0.75), (4, 0.5)]
    assert found.data.metrics["val/aime/pass_at_2"] == 0.25
    assert {file.path for file in client.list_artifacts(found.info.run_id, "samples")} == {
        f"samples/step-{step:08d}.json" for step in (1, 2, 3)
    }


def test_swanlab_for_real_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("swanlab")
    monkeypatch.setenv("SWANLAB_MODE", "offline")
    run_dir = two_starts(tmp_path, "swanlab", tags=("moe", "r3"))
    [run_id] = (run_dir.path / "trackers" / "swanlab-run-id").read_text().split()
    files = sorted((run_dir.path / "swanlab").glob("run-*/run-*.swanlab"))
    assert files and {file.stem for file in files} == {f"run-{run_id}"}
    text = b"".join(file.read_bytes() for file in files)
    assert b"val/aime/pass@2" in text and b"critic/score/mean" in text


def test_trackio_for_real(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trackio = pytest.importorskip("trackio")
    folder = tmp_path / "trackio"
    for module in (trackio, *(m for name, m in list(sys.modules.items()) if name.startswith("trackio."))):
        if hasattr(module, "TRACKIO_DIR"):  # read from the environment at its import
            monkeypatch.setattr(module, "TRACKIO_DIR", folder)
    two_starts(tmp_path, "trackio", auto_log_cpu=False)
    with sqlite3.connect(folder / "exp.db") as database:
        rows = database.execute("select run_name, step, metrics from metrics order by id").fetchall()
    assert len({name for name, _, _ in rows}) == 1
    found = [(step, json.loads(metrics)) for _, step, metrics in rows]
    assert (0, {"val/aime/pass@2": 0.25}) in found
    assert [step for step, metrics in found if "critic/score/mean" in metrics] == [1, 2, 3, 3, 4]
    assert any("samples" in metrics for _, metrics in found)
