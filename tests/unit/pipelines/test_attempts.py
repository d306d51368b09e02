"""Steps of a start, without a cluster."""

from __future__ import annotations

import contextlib
import json
import operator
import os
import signal
import time
import weakref
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import DEFAULT, MagicMock

import pytest

from roll_r3.config.pipeline import RLVRConfig
from roll_r3.errors import ConfigError, EngineError, LostWorkerError, WorkerError
from roll_r3.pipelines.evaluation import Evaluation
from roll_r3.pipelines.evaluation_metrics import EvaluatedSample
from roll_r3.pipelines.lifecycle import attempts
from roll_r3.pipelines.lifecycle.attempts import Attempts
from roll_r3.pipelines.lifecycle.shutdown import GracefulExit, Shutdown
from roll_r3.pipelines.rlvr import StepResult
from roll_r3.tracking.run_dir import RunDir


class Experience:
    """Data of a step, with handles of routes."""

    def __init__(self, step: int) -> None:
        self.step = step


class Pipeline:
    """Pipeline that counts the live data of previous steps when a step is sampled."""

    samples_seen, place = 0, "here"

    def __init__(self) -> None:
        self.kept: list[int] = []
        self._made: list[weakref.ref[Experience]] = []

    def sample(self, step: int) -> Experience:
        self.kept.append(sum(made() is not None for made in self._made))
        experience = Experience(step)
        self._made.append(weakref.ref(experience))
        return experience

    def learn(self, experience: Experience) -> StepResult:
        return StepResult({}, [])


def attempts_of(tmp_path: Path, shutdown: Shutdown | None = None, **fields: Any) -> Attempts:
    anything = MagicMock()
    return Attempts(
        RLVRConfig(exp_name="exp", pretrain="p", max_steps=3, actor_train={}, actor_infer={}, **fields),
        run_dir=RunDir(tmp_path, tmp_path),
        tokenizer=None,
        prompts=[],
        rewards=anything,
        progress=anything,
        shutdown=shutdown or Shutdown(60.0),
    )


def test_a_steps_routes_are_let_go_before_the_next_is_sampled(tmp_path: Path) -> None:
    pipeline = Pipeline()
    checkpoints: Any = MagicMock()
    checkpoints.seconds_waited.return_value = 1.5
    log: Any = MagicMock()
    attempts_of(tmp_path)._steps(pipeline, 0, log, checkpoints)
    assert pipeline.kept == [0, 0, 0]
    assert [call.args for call in log.write.call_args_list] == [(step, {"time/step_save": 1.5}) for step in (1, 2, 3)]
    assert [call.args for call in checkpoints.step_done.call_args_list] == [(step, 0, "here") for step in (1, 2, 3)]


EVALUATED = {"validation": {"data_args": {"file_name": "a"}}, "eval_steps": 2}
SAMPLE = EvaluatedSample("a", "row-0", 0, "default", "1+1=", "2", "2", 1.0, "stop", 1)


class Evaluating(Pipeline):
    """Pipeline with a record of everything done."""

    def __init__(self, done: list[str]) -> None:
        super().__init__()
        self.done = done

    def evaluate(self, step: int) -> Evaluation:
        self.done.append(f"evaluation {step}")
        return Evaluation(step, {"val/a/avg@1": 0.5}, [SAMPLE])

    def learn(self, experience: Experience) -> StepResult:
        self.done.append(f"step {experience.step}")
        return super().learn(experience)


def steps_of(run: Attempts, pipeline: Any, log: Any, done: int = 0) -> Any:
    checkpoints: Any = MagicMock()
    checkpoints.seconds_waited.return_value = 0.0
    checkpoints.step_done.side_effect = lambda step, *_: pipeline.done.append(f"saved {step}")
    run._steps(pipeline, done, log, checkpoints)
    return checkpoints


def test_evaluations_are_made_at_the_start_between_steps_and_at_the_end(tmp_path: Path) -> None:
    done: list[str] = []
    log: Any = MagicMock(evaluations={})
    steps_of(attempts_of(tmp_path, **EVALUATED), Evaluating(done), log)
    assert done == [
        "evaluation 0",
        *("step 1", "saved 1"),
        *("step 2", "saved 2", "evaluation 2"),
        *("step 3", "saved 3", "evaluation 3"),
    ]
    assert [call.args for call in log.write_evaluation.call_args_list] == [(s, {"val/a/avg@1": 0.5}) for s in (0, 2, 3)]
    rows = [json.loads(line) for line in (tmp_path / "validation.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [0, 2, 3]
    assert rows[0] == {"step": 0} | asdict(SAMPLE)


@pytest.mark.parametrize(("known", "again"), [({}, ["evaluation 2"]), ({2: {}}, [])])
def test_a_resumed_run_makes_the_evaluation_of_its_step_once(tmp_path: Path, known: Any, again: list[str]) -> None:
    done: list[str] = []
    steps_of(attempts_of(tmp_path, **EVALUATED), Evaluating(done), MagicMock(evaluations=known), done=2)
    assert done == [*again, "step 3", "saved 3", "evaluation 3"]


def test_sigterm_ends_an_evaluation_at_once_and_leaves_no_part_of_it(tmp_path: Path) -> None:
    class Terminated(Evaluating):
        def evaluate(self, step: int) -> Evaluation:
            if step == 2:
                os.kill(os.getpid(), signal.SIGTERM)
                time.sleep(0.05)
            return super().evaluate(step)

    done: list[str] = []
    log: Any = MagicMock(evaluations={})
    with pytest.raises(GracefulExit), Shutdown(60.0) as shutdown:
        steps_of(attempts_of(tmp_path, shutdown, **EVALUATED), Terminated(done), log)
    assert done == ["evaluation 0", "step 1", "saved 1", "step 2", "saved 2"]
    assert [call.args[0] for call in log.write_evaluation.call_args_list] == [0]


def test_sigterm_while_the_last_checkpoint_is_written_waits_for_it(tmp_path: Path) -> None:
    """End the ranks that write it as soon as the steps are over."""
    done: list[str] = []

    def wait() -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.05)  # the signal has been handled by now
        done.append("written")

    checkpoints: Any = MagicMock()
    checkpoints.seconds_waited.return_value = 0.0
    checkpoints.wait.side_effect = wait
    checkpoints.leave.side_effect = lambda step, *_: done.append(f"left after {step}")
    with pytest.raises(GracefulExit), Shutdown(60.0) as shutdown:
        attempts_of(tmp_path, shutdown)._steps(Pipeline(), 0, MagicMock(), checkpoints)
    assert done == ["written", "left after 3"]


def test_sigterm_while_a_call_of_rays_is_waiting_saves_the_newest_step(tmp_path: Path) -> None:
    """Let Ray raise its own SystemExit, with status 1."""

    class Waiting(Pipeline):
        def sample(self, step: int) -> Experience:
            if step == 2:
                with contextlib.suppress(SystemExit):
                    os.kill(os.getpid(), signal.SIGTERM)
                raise SystemExit(1)
            return super().sample(step)

    checkpoints: Any = MagicMock()
    checkpoints.seconds_waited.return_value = 0.0
    with pytest.raises(GracefulExit), Shutdown(60.0) as shutdown:
        attempts_of(tmp_path, shutdown)._steps(Waiting(), 0, MagicMock(), checkpoints)
    checkpoints.leave.assert_called_once_with(1, 0, "here")


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Stand-in for everything brought up by a start; `steps` is the outcome of its steps."""
    cluster: Any = MagicMock()
    for name in ("ray_cluster", "place", "Roles", "RLVRPipeline", "MetricLog", "Checkpoints", "rewind"):
        monkeypatch.setattr(attempts, name, getattr(cluster, name))
    monkeypatch.setattr(attempts, "data_of", MagicMock())
    monkeypatch.setattr(attempts, "source_of", MagicMock())
    monkeypatch.setattr(attempts, "newest_point", lambda *_: None)
    monkeypatch.setattr(Attempts, "_steps", cluster.steps)
    for name in ("ray_cluster", "place", "Roles", "MetricLog", "Checkpoints"):
        getattr(cluster, name).return_value.__exit__.return_value = False
    return cluster


WHERE = {
    "a place": ("Roles", ConfigError("engine 0 takes devices on different nodes, of which one has no GPU memory")),
    "what a checkpoint holds": (
        "Roles.return_value.__enter__.return_value.trainer.load_checkpoint",
        WorkerError("actor_train-0 failed: no GPU memory"),
    ),
    "a worker": ("Roles.return_value.__enter__.return_value.start", WorkerError("actor_infer-0 failed: no GPU memory")),
    "an engine": ("RLVRPipeline.return_value.start", EngineError("actor_infer-0 failed: no GPU memory")),
}


@pytest.mark.parametrize(("method", "error"), WHERE.values(), ids=WHERE)
def test_what_does_not_come_up_in_a_new_start_is_a_loss(
    tmp_path: Path, cluster: Any, method: str, error: Exception
) -> None:
    one_step = tmp_path / "metrics.jsonl"
    one_step.write_text('{"step": 1}\n')
    cluster.steps.side_effect = [LostWorkerError("actor_train-0 died"), ([], [])]
    starting = operator.attrgetter(method)(cluster)
    starting.side_effect = [DEFAULT, error, DEFAULT]
    point: Any = SimpleNamespace(checkpoint=tmp_path, state=MagicMock(step=0, samples_seen=0))
    attempts_of(tmp_path).run(point)
    assert starting.call_count == 3
    starting.side_effect = error
    with pytest.raises(type(error), match="no GPU memory") as caught:
        attempts_of(tmp_path).run(point)
    assert caught.value is error, "in the first start it is a setting more often than a fault"


def test_a_loss_is_said_before_the_rest_is_taken_down(tmp_path: Path, cluster: Any) -> None:
    """Report the loss first: the shutdown may hang in a process of Ray, and its parts must know of the loss."""
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n')
    happened: list[str] = []
    made = attempts_of(tmp_path)
    made._progress.say.side_effect = happened.append
    cluster.steps.side_effect = [LostWorkerError("actor_train-0 died"), ([], [])]
    exits = cluster.Roles.return_value.__exit__
    exits.side_effect = lambda *error: happened.append(f"taken down after {error[-3]}")
    made.run(SimpleNamespace(checkpoint=tmp_path, state=MagicMock(step=0, samples_seen=0)))  # type: ignore[arg-type]
    assert happened[0] == "LOST: actor_train-0 died"
    assert happened[1] == f"taken down after {LostWorkerError}"
    assert happened[-1] == "taken down after None"


def test_a_loss_of_no_use_is_raised_once_and_as_it_is(tmp_path: Path, cluster: Any) -> None:
    cluster.steps.side_effect = [LostWorkerError("actor_train-0 died")]
    made = attempts_of(tmp_path)
    with pytest.raises(LostWorkerError, match="died\nthe run had not made a step"):
        made.run(None)
    made._progress.say.assert_not_called()


def test_a_loss_that_only_the_end_of_ray_tells_is_one(tmp_path: Path, cluster: Any) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n')
    cluster.steps.side_effect = [RuntimeError("of Ray's"), ([], [])]
    cluster.ray_cluster.return_value.__exit__.side_effect = [LostWorkerError("Ray failed"), False]
    made = attempts_of(tmp_path)
    made.run(SimpleNamespace(checkpoint=tmp_path, state=MagicMock(step=0, samples_seen=0)))  # type: ignore[arg-type]
    assert next(call.args[0] for call in made._progress.say.call_args_list) == "LOST: Ray failed"
