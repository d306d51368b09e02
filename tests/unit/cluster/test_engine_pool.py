"""The pool of engines against a fake cluster: balancing, order of completion, lost engines, versions."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable, Sequence
from dataclasses import replace
from typing import Any

import pytest
from whole_rollout import sample_all

from roll_r3.batch.trajectory import Trajectory
from roll_r3.cluster.engine_pool import EnginePool, joined, still_lost
from roll_r3.config.pipeline import RLVRConfig
from roll_r3.config.sampling_settings import Sampling
from roll_r3.errors import EngineError
from roll_r3.strategies.base import GenerateRequest, GenerateResult

SAMPLING = Sampling(max_new_tokens=8)


def group(name: str, size: int = 2, sampling: Sampling = SAMPLING) -> GenerateRequest:
    return GenerateRequest(
        (1, 2), tuple(f"{name}{i}" for i in range(size)), tuple(range(size)), name, sampling, record_routes=True
    )


def trajectory(sample_id: str, version: int = 1) -> Trajectory:
    return Trajectory.one_turn(
        sample_id, "g", prompt_ids=[1], response_ids=[1], log_probs=[-1.0], version=version, finish_reason="stop"
    )


DEATH = "engine died: killed; the end of x.log:\nlog"


class Cluster:
    """Engines and trainer: what each is told, time that passes while they are waited for, and faults on demand.

    A request takes as many seconds as `seconds` says of its engine, a restart takes 10. An engine runs one request
    after the other.
    """

    def __init__(self, engines: int = 2) -> None:
        self.names = tuple(f"actor_infer-{i}" for i in range(engines))
        self.seconds = dict.fromkeys(self.names, 1.0)
        self.now = 0.0
        self.log: list[Any] = []
        self.asked: list[tuple[str, GenerateRequest]] = []
        """Every request: its engine, and the request."""
        self.done: list[str] = []
        """The engine of every answer."""
        self.is_down: dict[str, str] = {}
        self.loses: list[tuple[str, tuple[str, ...]]] = []
        """The next deaths: an engine, and the samples that it does not bring. It dies once it is asked for one."""
        self.updates_fail: list[tuple[str, dict[str, str]]] = []
        """Updates: the trainer's reason of the failure -> the engines that are down then."""
        self.starts_fail: list[str] = []
        self.versions = dict.fromkeys(self.names, -1)
        self._ends: dict[int, tuple[float, Callable[[], Any]]] = {}
        self._free = dict.fromkeys(self.names, 0.0)
        self._calls = 0
        self.aborted: list[Hashable] = []

    def _call(self, at: float, end: Callable[[], Any]) -> int:
        self._calls += 1
        self._ends[self._calls] = at, end
        return self._calls

    def begin_generate(self, name: str, requests: Sequence[GenerateRequest]) -> list[Hashable]:
        self.log.append((name, *(r.group_id for r in requests)))
        calls: list[Hashable] = []
        for request in requests:
            assert self.versions[name] >= 0, "an engine is given weights before it is asked"
            self.asked.append((name, request))
            self._free[name] = max(self._free[name], self.now) + self.seconds[name]
            calls.append(self._call(self._free[name], lambda n=name, r=request: self._answer(n, r)))  # type: ignore[misc]
        return calls

    def _answer(self, name: str, request: GenerateRequest) -> GenerateResult:
        self.done.append(name)
        if self.loses and self.loses[0][0] == name and set(self.loses[0][1]) & set(request.sample_ids):
            gone = self.loses.pop(0)[1]
            self.is_down[name] = DEATH
        else:
            gone = request.sample_ids if name in self.is_down else ()
        return GenerateResult(
            tuple(trajectory(i, self.versions[name]) for i in request.sample_ids if i not in gone),
            lost=tuple(i for i in request.sample_ids if i in gone),
            retries=1,
        )

    def abort(self, calls: Sequence[Hashable]) -> None:
        for call in calls:
            self._ends[call] = self.now, lambda: GenerateResult(())  # type: ignore[index]
        self.aborted += calls

    def begin_restart(self, name: str) -> Hashable:
        self.log.append(("restart", name))
        self.versions[name] = -1

        def started() -> str:
            failure = self.starts_fail.pop(0) if self.starts_fail else ""
            if not failure:
                self.is_down.pop(name, None)
            return failure

        return self._call(self.now + 10.0, started)

    def ended(self, timeout: float | None) -> dict[Hashable, Any]:
        assert self._ends, "somebody waits for nothing"
        first = min(at for at, _ in self._ends.values())
        if timeout is not None and first > self.now + timeout:
            self.now += timeout
            return {}
        self.now = max(self.now, first)
        ready = [call for call, (at, _) in self._ends.items() if at <= self.now]
        return {call: self._ends.pop(call)[1]() for call in ready}

    def down(self, *, ask: bool) -> dict[str, str]:
        return dict(self.is_down)

    def weight_targets(self) -> list[Any]:
        return ["targets"]

    def connect_engines(self, targets: Sequence[Any]) -> None:
        assert targets == ["targets"]
        self.log.append("connect")

    def update_weights(self, version: int) -> str:
        assert not self._ends, "nothing is under way while weights change"
        failure, self.is_down = self.updates_fail.pop(0) if self.updates_fail else ("", {})
        self.log.append(("update", version, failure))
        return failure

    def weights_updated(self, version: int) -> None:
        assert not self.is_down
        self.versions = dict.fromkeys(self.names, version)
        self.log.append(("updated", version))


def pool_of(
    cluster: Cluster, max_restarts: int = 3, at_once: int = 4, hf: bool = False
) -> tuple[EnginePool, list[str]]:
    settings = {"max_running_requests": at_once} | ({} if hf else {"max_restarts": max_restarts})
    infer = {"strategy_args": {"strategy_name": "hf_infer" if hf else "sglang", "strategy_config": settings}}
    config = RLVRConfig.model_validate({"exp_name": "x", "pretrain": "p", "actor_train": {}, "actor_infer": infer})
    said: list[str] = []
    pool = EnginePool(config, cluster, cluster, said.append)
    pool.update_weights(7)
    assert cluster.log == ["connect", ("update", 7, ""), ("updated", 7)]
    cluster.log.clear()
    return pool, said


def groups_of(cluster: Cluster) -> dict[str, list[str]]:
    """Engine -> the groups that it was asked for, in order."""
    return {name: [r.group_id for n, r in cluster.asked if n == name] for name in cluster.names}


def ids_of(results: Sequence[GenerateResult]) -> list[list[str]]:
    return [[t.sample_id for t in result.trajectories] for result in results]


REQUESTS = [group("a", 3), group("b", 2)]


def test_without_faults_weights_are_sent_over_one_connection() -> None:
    cluster = Cluster()
    pool, said = pool_of(cluster)
    assert ids_of(sample_all(pool, REQUESTS)) == [["a0", "a1", "a2"], ["b0", "b1"]]
    pool.update_weights(8)
    assert cluster.log[2:] == [("update", 8, ""), ("updated", 8)]
    assert (pool.step_done(), said, pool.in_flight) == (0, [], 0)


def test_requests_that_fit_are_spread_in_turn_and_given_at_once() -> None:
    """As engines batch what they are given at once, each gets its share in one call."""
    cluster = Cluster()
    pool, _ = pool_of(cluster)
    sample_all(pool, [group(name) for name in "abcdefg"])
    assert cluster.log == [("actor_infer-0", *"aceg"), ("actor_infer-1", *"bdf")]


def test_a_quicker_engine_gets_more() -> None:
    cluster = Cluster()
    cluster.seconds["actor_infer-1"] = 5.0
    pool, _ = pool_of(cluster, at_once=1)
    results = sample_all(pool, [group(f"g{i}-") for i in range(30)])
    assert ids_of(results) == [[f"g{i}-0", f"g{i}-1"] for i in range(30)], "in the order asked for"
    assert {name: len(found) for name, found in groups_of(cluster).items()} == {"actor_infer-0": 24, "actor_infer-1": 6}


def test_no_engine_is_given_more_than_four_times_what_it_runs_at_once() -> None:
    """With less it would stand idle behind the longest samples of its groups."""
    cluster = Cluster()
    pool, _ = pool_of(cluster, at_once=4)
    pool.submit([group(f"g{i}-") for i in range(20)])
    assert Counter(name for name, _ in cluster.asked) == dict.fromkeys(cluster.names, 8)
    assert pool.in_flight == 20


def test_an_engine_has_two_groups_even_if_one_fills_it() -> None:
    """If one group alone fails, the engine is not found broken."""
    cluster = Cluster()
    pool, _ = pool_of(cluster, at_once=2)
    pool.submit([group(f"g{i}-", 16) for i in range(9)])
    for _ in range(3):
        under_way = Counter(name for name, _ in cluster.asked) - Counter(cluster.done)
        assert under_way == dict.fromkeys(cluster.names, 2)
        pool.completed()
        pool.submit([])


def test_transformers_engines_get_their_shares_at_once_and_in_turn() -> None:
    """Their batches, and the last bits of their samples, follow from what they are given and when."""
    cluster = Cluster()
    cluster.seconds["actor_infer-1"] = 5.0
    pool, _ = pool_of(cluster, at_once=1, hf=True)
    sample_all(pool, [group(f"g{i}") for i in range(40)])
    assert cluster.log == [
        (name, *(f"g{i}" for i in range(n, 40, 2))) for n, name in enumerate(("actor_infer-0", "actor_infer-1"))
    ]


def test_a_group_is_never_split_even_if_it_is_larger_than_an_engine() -> None:
    cluster = Cluster()
    pool, _ = pool_of(cluster, at_once=2)
    asked = [group(f"g{i}-", 16) for i in range(5)]
    sample_all(pool, asked)
    assert sorted((r for _, r in cluster.asked), key=lambda r: r.group_id) == asked


def test_results_come_in_the_order_in_which_they_end() -> None:
    cluster = Cluster()
    cluster.seconds["actor_infer-0"] = 2.5
    pool, _ = pool_of(cluster)
    tickets = pool.submit([group(name) for name in "abcd"])
    assert [ticket.request.group_id for ticket in tickets] == list("abcd")
    came: list[str] = []
    left = []
    while pool.in_flight:
        found = pool.completed()
        assert found
        came += [done.ticket.request.group_id for done in found]
        left.append(pool.in_flight)
    assert came == ["b", "d", "a", "c"]
    assert left == [3, 2, 1, 0]


def test_a_wait_ends_when_its_time_is_up(monkeypatch: pytest.MonkeyPatch) -> None:
    cluster = Cluster()
    cluster.seconds = dict.fromkeys(cluster.names, 5.0)
    pool, _ = pool_of(cluster)
    monkeypatch.setattr("roll_r3.cluster.engine_pool.time.monotonic", lambda: cluster.now)
    assert pool.completed(1.0) == [], "nothing is in flight"
    pool.submit([group("a")])
    assert pool.completed(0.0) == pool.completed(2.0) == []
    assert cluster.now == 2.0
    assert [done.ticket.request.group_id for done in pool.completed(4.0)] == ["a"]


def test_more_requests_may_be_submitted_while_others_are_in_flight() -> None:
    cluster = Cluster()
    pool, _ = pool_of(cluster)
    pool.submit([group("a"), group("b")])
    came = []
    for name in "cdef":
        came += [done.ticket.request.group_id for done in pool.completed()]
        pool.submit([group(name)])
    while pool.in_flight:
        came += [done.ticket.request.group_id for done in pool.completed()]
    assert sorted(came) == list("abcdef")


def test_each_request_brings_its_own_sampling_settings_to_the_engine() -> None:
    cluster = Cluster()
    pool, _ = pool_of(cluster)
    cold = Sampling(max_new_tokens=3, temperature=0.1, top_k=1)
    sample_all(pool, [group("a"), group("b", sampling=cold), replace(group("c"), record_routes=False)])
    found = {r.group_id: (r.sampling, r.record_routes) for _, r in cluster.asked}
    assert found == {"a": (SAMPLING, True), "b": (cold, True), "c": (SAMPLING, False)}


def test_an_update_waits_for_requests_under_way_and_holds_the_others() -> None:
    """Each sample is of one version: that of the weights with which it began."""
    cluster = Cluster()
    pool, _ = pool_of(cluster, at_once=1)
    pool.submit([group(f"g{i}-") for i in range(8)])
    pool.update_weights(8)
    found = {}
    while pool.in_flight:
        found |= {done.ticket.number: done.result for done in pool.completed()}
    versions = [{t.weight_versions for t in found[i].trajectories} for i in range(8)]
    assert versions == [{(7,)}] * 4 + [{(8,)}] * 4


def test_samples_of_a_lost_engine_are_asked_again_while_it_is_restarted() -> None:
    cluster = Cluster()
    pool, said = pool_of(cluster)
    cluster.loses = [("actor_infer-0", ("a1", "a2"))]
    results = sample_all(pool, REQUESTS)
    assert ids_of(results) == [["a0", "a1", "a2"], ["b0", "b1"]], "each once, in the order asked for"
    assert [(r.lost, r.dropped, r.retries) for r in results] == [((), {}, 2), ((), {}, 1)]
    again = cluster.asked[-1]
    assert (again[0], again[1].sample_ids, again[1].seeds) == ("actor_infer-1", ("a1", "a2"), (1, 2))
    assert cluster.now < 10, "nobody waited for the restart"
    assert [line.partition(" failed")[0] for line in said] == ["actor_infer-0", "samples requested again: 2"]
    assert pool.step_done() == 1
    assert pool.step_done() == 0
    cluster.log.clear()
    pool.update_weights(8)
    assert cluster.log == ["connect", ("update", 8, ""), ("updated", 8)]
    assert ids_of(sample_all(pool, REQUESTS)) == [["a0", "a1", "a2"], ["b0", "b1"]]


def test_an_engine_lost_with_requests_under_way_and_in_the_queue_comes_back_with_the_weights() -> None:
    cluster = Cluster()
    pool, said = pool_of(cluster, at_once=1)
    cluster.loses = [("actor_infer-1", ("g1-0",))]
    results = sample_all(pool, [group(f"g{i}-") for i in range(40)])
    assert ids_of(results) == [[f"g{i}-0", f"g{i}-1"] for i in range(40)]
    assert {v for r in results for t in r.trajectories for v in t.weight_versions} == {7}
    assert "samples requested again: 3" in said, "one of the first group, all of the second"
    restarted = cluster.log.index(("restart", "actor_infer-1"))
    sent = cluster.log.index(("updated", 7))
    between = [entry[0] for entry in cluster.log[restarted + 1 : sent] if entry[0] in cluster.names]
    assert between and set(between) == {"actor_infer-0"}, "the other goes on meanwhile"
    assert ("actor_infer-1" in {entry[0] for entry in cluster.log[sent:]}) is True


def test_if_all_engines_are_lost_their_samples_wait_for_the_weights() -> None:
    cluster = Cluster()
    pool, said = pool_of(cluster)
    cluster.loses = [("actor_infer-0", ("a0", "a1", "a2")), ("actor_infer-1", ("b0",))]
    assert ids_of(sample_all(pool, REQUESTS)) == [["a0", "a1", "a2"], ["b0", "b1"]]
    back = ["connect", ("update", 7, ""), ("updated", 7)]
    assert [entry for entry in cluster.log if entry[0] not in cluster.names] == [
        ("restart", "actor_infer-0"),
        ("restart", "actor_infer-1"),
        *back,
    ]
    assert [line for line in said if line.startswith("samples")] == ["samples requested again: 4"]
    assert pool.step_done() == 2


def test_an_engine_that_goes_down_too_often_in_a_step_ends_the_run() -> None:
    cluster = Cluster(engines=1)
    pool, said = pool_of(cluster, max_restarts=2)
    cluster.loses = [("actor_infer-0", ("a1",))] * 3
    with pytest.raises(EngineError) as caught:
        sample_all(pool, REQUESTS)
    assert str(caught.value) == (
        "actor_infer-0 failed: engine died: killed; the end of x.log:\nlog\n"
        "It failed 3 times before a step was done, and "
        "actor_infer.strategy_args.strategy_config.max_restarts is 2"
    )
    assert [line for line in said if "failed" in line] == [
        f"actor_infer-0 failed and is restarted ({n} of 2 times before a step is done): engine died: killed "
        "(more in logs/driver.log)"
        for n in (1, 2)
    ]


def test_the_count_of_failures_starts_again_with_every_step_and_is_kept_for_each_engine() -> None:
    cluster = Cluster()
    pool, _ = pool_of(cluster, max_restarts=1)
    for _ in range(3):
        cluster.loses = [("actor_infer-0", ("a0",)), ("actor_infer-1", ("b1",))]
        sample_all(pool, REQUESTS)
        pool.update_weights(8)
        assert pool.step_done() == 2


def test_zero_restarts_end_the_run_with_the_first_death() -> None:
    cluster = Cluster()
    pool, _ = pool_of(cluster, max_restarts=0)
    cluster.loses = [("actor_infer-0", ("a0",))]
    with pytest.raises(EngineError, match="actor_infer-0 failed: engine died"):
        sample_all(pool, REQUESTS)
    assert ("restart", "actor_infer-0") not in cluster.log


def test_an_engine_that_died_between_is_restarted_before_the_weights() -> None:
    cluster = Cluster()
    pool, _ = pool_of(cluster)
    cluster.is_down = {"actor_infer-0": "engine died"}
    pool.update_weights(8)
    assert cluster.log == [("restart", "actor_infer-0"), "connect", ("update", 8, ""), ("updated", 8)]


def test_an_update_that_an_engine_broke_is_done_again_with_all_engines_restarted() -> None:
    cluster = Cluster()
    pool, _ = pool_of(cluster, max_restarts=1)
    cluster.updates_fail = [("not reachable", {"actor_infer-1": "engine died"})]
    pool.update_weights(8)
    assert cluster.log == [
        ("update", 8, "not reachable"),
        ("restart", "actor_infer-1"),
        ("restart", "actor_infer-0"),
        "connect",
        ("update", 8, ""),
        ("updated", 8),
    ]
    cluster.updates_fail = [("not reachable", {"actor_infer-0": "engine died"})]
    pool.update_weights(8)
    assert pool.step_done() == 4, "an engine that only suffers from it is restarted and not blamed"


@pytest.mark.parametrize("hf", [False, True])
def test_an_update_that_engines_in_good_health_refuse_ends_the_run(hf: bool) -> None:
    cluster = Cluster()
    pool, _ = pool_of(cluster, hf=hf)
    cluster.updates_fail = [("refused: no such tensor", {})]
    with pytest.raises(EngineError, match="the engines did not get weights 8: refused: no such tensor"):
        pool.update_weights(8)
    assert ("updated", 8) not in cluster.log


def test_an_engine_that_does_not_come_up_again_is_restarted_again() -> None:
    cluster = Cluster(engines=1)
    pool, said = pool_of(cluster)
    cluster.loses = [("actor_infer-0", ("a0",))]
    cluster.starts_fail = ["did not start: no memory"]
    sample_all(pool, REQUESTS)
    assert [entry for entry in cluster.log if entry[0] == "restart"] == [("restart", "actor_infer-0")] * 2
    assert any("did not start: no memory" in line for line in said)
    cluster.loses, cluster.starts_fail = [("actor_infer-0", ("a0",))], ["no memory"] * 9
    with pytest.raises(EngineError, match="actor_infer-0 failed: no memory"):
        sample_all(pool, REQUESTS)


def test_dropped_samples_stay_dropped() -> None:
    first = GenerateResult((trajectory("a2"),), {"a0": "bad"}, lost=("a1",), retries=2)
    asked = REQUESTS[0]
    assert still_lost(asked, first) == replace(asked, sample_ids=("a1",), seeds=(1,))
    whole = joined(asked, first, GenerateResult((trajectory("a1"),), retries=1))
    assert ids_of([whole]) == [["a1", "a2"]]
    assert (whole.dropped, whole.lost, whole.retries) == ({"a0": "bad"}, (), 3)
    worse = joined(asked, first, GenerateResult((), {"a1": "worse"}))
    assert worse.dropped == {"a0": "bad", "a1": "worse"}


def test_a_sample_that_came_twice_is_refused() -> None:
    first = GenerateResult((trajectory("a0"),), lost=("a1",))
    with pytest.raises(AssertionError, match="not asked for again"):
        joined(REQUESTS[0], first, GenerateResult((trajectory("a0"),)))


def test_aborted_requests_never_complete_and_their_engines_get_others() -> None:
    cluster = Cluster(engines=1)
    cluster.seconds["actor_infer-0"] = 5.0
    pool, _ = pool_of(cluster, at_once=1)
    tickets = pool.submit([group(name) for name in "abcdef"])
    assert [request.group_id for _, request in cluster.asked] == ["a", "b"]
    pool.abort([tickets[i] for i in (1, 3, 4)])
    assert (pool.in_flight, len(cluster.aborted)) == (3, 1), "queued ones never reach an engine"
    came = [done.ticket.request.group_id for done in pool.completed()]
    while pool.in_flight:
        came += [done.ticket.request.group_id for done in pool.completed()]
    assert came == ["a", "c", "f"]
    assert [request.group_id for _, request in cluster.asked] == ["a", "b", "c", "f"]
    pool.abort(tickets)
    assert (pool.in_flight, pool.completed(), pool.step_done()) == (0, [], 0)


def test_completed_requests_can_still_be_aborted_and_an_update_waits_for_the_rest() -> None:
    cluster = Cluster()
    cluster.seconds["actor_infer-1"] = 5.0
    pool, _ = pool_of(cluster)
    tickets = pool.submit([group("a"), group("b"), group("c")])
    pool._take(None)
    pool.abort([tickets[0], tickets[1]])
    pool.update_weights(8)  # the cluster asserts that nothing is under way
    assert [done.ticket.request.group_id for done in pool.completed()] == ["c"]


def test_an_engine_that_dies_under_an_aborted_request_is_restarted() -> None:
    cluster = Cluster(engines=1)
    pool, said = pool_of(cluster)
    (ticket,) = pool.submit([group("a")])
    pool.abort([ticket])
    call = cluster.aborted[0]
    cluster._ends[call] = cluster.now, lambda: GenerateResult((), lost=("a0",))  # type: ignore[index]
    cluster.is_down["actor_infer-0"] = DEATH
    assert ids_of(sample_all(pool, [group("b")])) == [["b0", "b1"]]
    assert pool.step_done() == 1
    assert "samples requested again: 2" in said, "those of b alone"
