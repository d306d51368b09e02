"""Retried samples, restarted engines and updates of weights, in front of a stand-in for the cluster."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import numpy as np
import pytest

from roll_r3.batch.trajectory import Trajectory
from roll_r3.config.pipeline import RLVRConfig
from roll_r3.errors import EngineError
from roll_r3.pipelines.engines import Engines, completed, still_lost
from roll_r3.strategies.base import GenerateRequest, GenerateResult

REQUESTS = [
    GenerateRequest((1, 2), ("a0", "a1", "a2"), (10, 11, 12)),
    GenerateRequest((3,), ("b0", "b1"), (20, 21)),
]


def trajectory(sample_id: str, version: int = 1) -> Trajectory:
    ids = np.array([1], np.int32)
    return Trajectory(sample_id, ids, ids, np.array([-1.0], np.float32), "stop", (version,))


class Cluster:
    """Rollout and trainer with a log of their calls, and faults on demand."""

    names = ("actor_infer-0", "actor_infer-1")

    def __init__(self) -> None:
        self.log: list[Any] = []
        self.is_down: dict[str, str] = {}
        self.loses: list[dict[str, Collection[str]]] = []
        """For each `generate`: failing engine -> its lost samples."""
        self.updates_fail: list[tuple[str, dict[str, str]]] = []
        """For each update: (the trainer's message, failing engines)."""
        self.starts_fail: list[dict[str, str]] = []

    def generate(self, requests: Sequence[GenerateRequest]) -> list[GenerateResult]:
        self.log.append([(r.sample_ids, r.seeds) for r in requests])
        assert not self.is_down
        lost = self.loses.pop(0) if self.loses else {}
        self.is_down = dict.fromkeys(lost, "engine died: killed; the end of x.log:\nlog")
        gone = {sample_id for ids in lost.values() for sample_id in ids}
        return [
            GenerateResult(
                tuple(trajectory(i) for i in request.sample_ids if i not in gone),
                lost=tuple(i for i in request.sample_ids if i in gone),
                retries=1,
            )
            for request in requests
        ]

    def down(self, *, ask: bool) -> dict[str, str]:
        return self.is_down

    def restart(self, names: Collection[str]) -> dict[str, str]:
        self.log.append(("restart", *sorted(names)))
        self.is_down = self.starts_fail.pop(0) if self.starts_fail else {}
        return self.is_down

    def weight_targets(self) -> list[Any]:
        return ["targets"]

    def connect_engines(self, targets: Sequence[Any]) -> None:
        assert targets == ["targets"]
        self.log.append("connect")

    def update_weights(self, version: int) -> str:
        failure, self.is_down = self.updates_fail.pop(0) if self.updates_fail else ("", {})
        self.log.append(("update", version, failure))
        return failure

    def weights_updated(self, version: int) -> None:
        assert not self.is_down
        self.log.append(("updated", version))


def engines(cluster: Cluster, max_restarts: int = 3, strategy: str = "sglang") -> tuple[Engines, list[str]]:
    settings = {"strategy_name": strategy} | (
        {"strategy_config": {"max_restarts": max_restarts}} if strategy == "sglang" else {}
    )
    infer = {"strategy_args": settings}
    config = RLVRConfig.model_validate({"exp_name": "x", "pretrain": "p", "actor_train": {}, "actor_infer": infer})
    said: list[str] = []
    made = Engines(config, cluster, cluster, said.append)  # type: ignore[arg-type]
    made.send_weights(7)
    assert cluster.log == ["connect", ("update", 7, ""), ("updated", 7)]
    cluster.log.clear()
    return made, said


def ids_of(results: Sequence[GenerateResult]) -> list[list[str]]:
    return [[t.sample_id for t in result.trajectories] for result in results]


def test_without_faults_weights_are_sent_over_one_connection() -> None:
    cluster = Cluster()
    made, said = engines(cluster)
    assert ids_of(made.generate(REQUESTS)) == [["a0", "a1", "a2"], ["b0", "b1"]]
    made.send_weights(8)
    assert cluster.log[1:] == [("update", 8, ""), ("updated", 8)]
    assert (made.step_done(), said) == (0, [])


def test_lost_samples_are_asked_for_again_once_the_engine_has_the_steps_weights() -> None:
    cluster = Cluster()
    made, said = engines(cluster)
    cluster.loses = [{"actor_infer-1": ("a1", "b0", "b1")}, {"actor_infer-0": ("b1",)}]
    results = made.generate(REQUESTS)
    assert ids_of(results) == [["a0", "a1", "a2"], ["b0", "b1"]], "each once, in the order asked for"
    assert [(r.lost, r.dropped, r.retries) for r in results] == [((), {}, 2), ((), {}, 3)]
    back = ["connect", ("update", 7, ""), ("updated", 7)]
    assert cluster.log[1:] == [
        ("restart", "actor_infer-1"),
        *back,
        [(("a1",), (11,)), (("b0", "b1"), (20, 21))],
        ("restart", "actor_infer-0"),
        *back,
        [(("b1",), (21,))],
    ]
    assert [line.partition(" failed")[0] for line in said if "failed" in line] == ["actor_infer-1", "actor_infer-0"]
    assert made.step_done() == 2
    assert made.step_done() == 0


def test_an_engine_that_goes_down_too_often_in_a_step_ends_the_run() -> None:
    cluster = Cluster()
    made, said = engines(cluster, max_restarts=2)
    cluster.loses = [{"actor_infer-1": ("a1",)}] * 3
    with pytest.raises(EngineError) as caught:
        made.generate(REQUESTS)
    assert str(caught.value) == (
        "actor_infer-1 failed: engine died: killed; the end of x.log:\nlog\n"
        "It failed 3 times before a step was done, and "
        "actor_infer.strategy_args.strategy_config.max_restarts is 2"
    )
    assert said[1] == "samples asked for again: 1"
    assert [line for line in said if "failed" in line] == [
        f"actor_infer-1 failed, and is started again ({n} of 2 times before a step is done): engine died: killed "
        "(more in logs/driver.log)"
        for n in (1, 2)
    ]


def test_every_step_and_every_engine_counts_anew() -> None:
    cluster = Cluster()
    made, _ = engines(cluster, max_restarts=1)
    for _ in range(3):
        cluster.loses = [{"actor_infer-0": ("a0",), "actor_infer-1": ("a1",)}]
        made.generate(REQUESTS)
        assert made.step_done() == 2


def test_zero_restarts_end_the_run_with_the_first_death() -> None:
    cluster = Cluster()
    made, _ = engines(cluster, max_restarts=0)
    cluster.loses = [{"actor_infer-0": ("a0",)}]
    with pytest.raises(EngineError, match="actor_infer-0 failed: engine died"):
        made.generate(REQUESTS)
    assert ("restart", "actor_infer-0") not in cluster.log


def test_an_engine_that_died_between_is_started_again_before_the_weights() -> None:
    cluster = Cluster()
    made, _ = engines(cluster)
    cluster.is_down = {"actor_infer-0": "engine died"}
    made.send_weights(8)
    assert cluster.log == [("restart", "actor_infer-0"), "connect", ("update", 8, ""), ("updated", 8)]


def test_an_update_that_an_engine_broke_is_done_again_with_all_engines_anew() -> None:
    cluster = Cluster()
    made, _ = engines(cluster, max_restarts=1)
    cluster.updates_fail = [("not reachable", {"actor_infer-1": "engine died"})]
    made.send_weights(8)
    assert cluster.log == [
        ("update", 8, "not reachable"),
        ("restart", "actor_infer-0", "actor_infer-1"),
        "connect",
        ("update", 8, ""),
        ("updated", 8),
    ]
    cluster.updates_fail = [("not reachable", {"actor_infer-0": "engine died"})]
    made.send_weights(8)
    assert made.step_done() == 4, "who only suffers from it is started again and not blamed"


@pytest.mark.parametrize("strategy", ["sglang", "hf_infer"])
def test_an_update_that_engines_in_good_health_refuse_ends_the_run(strategy: str) -> None:
    cluster = Cluster()
    made, _ = engines(cluster, strategy=strategy)
    cluster.updates_fail = [("refused: no such tensor", {})]
    with pytest.raises(EngineError, match="the engines did not get weights 8: refused: no such tensor"):
        made.send_weights(8)
    assert ("updated", 8) not in cluster.log


def test_an_engine_that_does_not_come_up_again_is_tried_again() -> None:
    cluster = Cluster()
    made, said = engines(cluster)
    cluster.loses = [{"actor_infer-0": ("a0",)}]
    cluster.starts_fail = [{"actor_infer-0": "did not start: no memory"}]
    made.generate(REQUESTS)
    assert [entry for entry in cluster.log if entry[0] == "restart"] == [("restart", "actor_infer-0")] * 2
    assert "did not start: no memory" in said[1]
    cluster.loses, cluster.starts_fail = [{"actor_infer-0": ("a0",)}], [{"actor_infer-0": "no memory"}] * 9
    with pytest.raises(EngineError, match="actor_infer-0 failed: no memory"):
        made.generate(REQUESTS)


def test_what_is_dropped_stays_dropped() -> None:
    first = GenerateResult((trajectory("a2"),), {"a0": "bad"}, lost=("a1",), retries=2)
    assert still_lost(REQUESTS[0], first) == GenerateRequest((1, 2), ("a1",), (11,))
    whole = completed(REQUESTS[0], first, GenerateResult((trajectory("a1"),), retries=1))
    assert ids_of([whole]) == [["a1", "a2"]]
    assert (whole.dropped, whole.lost, whole.retries) == ({"a0": "bad"}, (), 3)
    worse = completed(REQUESTS[0], first, GenerateResult((), {"a1": "worse"}))
    assert worse.dropped == {"a0": "bad", "a1": "worse"}


def test_a_sample_that_came_twice_is_no_sample() -> None:
    first = GenerateResult((trajectory("a0"),), lost=("a1",))
    with pytest.raises(AssertionError, match="not asked for again"):
        completed(REQUESTS[0], first, GenerateResult((trajectory("a0"),)))
