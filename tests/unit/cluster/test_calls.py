"""Choice of the reported failure among several, its form, and reports during silence, without a cluster."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import ray
from ray.exceptions import ActorDiedError, RayError, RayTaskError

from roll_r3.cluster import calls
from roll_r3.cluster.daemons import Daemon
from roll_r3.cluster.life_signs import Identity
from roll_r3.config.sections import WorkerTimeoutsConfig
from roll_r3.errors import EngineError, LostWorkerError, RouteError, WorkerError


def raised(cause: Exception) -> RayTaskError:
    """Return a worker's exception as seen by the driver."""
    return RayTaskError("train_step", "...", cause)


LOST, DAMAGED = LostWorkerError("routes are lost"), RouteError("a check sum is wrong")
FAILURES = {
    "lost": ([LOST], LostWorkerError, "rank-0 failed: routes are lost"),
    "lost, and another's own error": ([DAMAGED, LOST], LostWorkerError, r"rank-1 failed \(and.*rank-0\): routes are"),
    "a death, and what it brought about": ([LOST, ActorDiedError()], LostWorkerError, "rank-1 died"),
    "ours": ([DAMAGED], WorkerError, "rank-0 failed: a check sum is wrong"),
    "ours, and a library's": ([RuntimeError("closed"), EngineError("no")], WorkerError, r"rank-1 failed \(.*\): no"),
    "a library's": ([RuntimeError("closed")], LostWorkerError, "rank-0 failed: RuntimeError: closed"),
}


@pytest.mark.parametrize(("errors", "kind", "said"), FAILURES.values(), ids=FAILURES)
def test_a_loss_stays_one_whoever_tells_of_it(
    tmp_path: Path, errors: Sequence[Exception], kind: type[WorkerError], said: str
) -> None:
    failures = {
        (f"rank-{i}", tmp_path / f"{i}.log"): e if isinstance(e, RayError) else raised(e) for i, e in enumerate(errors)
    }
    with pytest.raises(kind, match=said) as caught:
        raise calls._failure(failures)
    assert type(caught.value) is kind


NOTHING = Path("/dev/null")


class Clock:
    """Driver's clock; it advances during waits; `jump` is time in which the driver does not run."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, results: Mapping[str, float]) -> None:
        """Start the clock.

        Args:
            results: call -> seconds until it is done.
        """
        self.now = 1000.0
        self._done = {ref: self.now + seconds for ref, seconds in results.items()}
        monkeypatch.setattr(calls, "time", self)
        monkeypatch.setattr(calls, "vital", lambda: [])
        monkeypatch.setattr(ray, "wait", self._wait)
        monkeypatch.setattr(ray, "get", lambda ref: f"of {ref}")

    def monotonic(self) -> float:
        return self.now

    def _wait(self, pending: list[Any], *, num_returns: int, timeout: float) -> tuple[list[Any], list[Any]]:
        if not any(self._done[ref] <= self.now for ref in pending):
            self.now += timeout
        ready = [ref for ref in pending if self._done[ref] <= self.now][:num_returns]
        return ready, [ref for ref in pending if ref not in ready]


class Worker:
    """Stand-in for `Watched`, silent from a given second on, with a given process state."""

    def __init__(self, name: str, *, silent_from: float = 1e9, until: float = 1e9, state: str = "stopped") -> None:
        self.name, self.identity = name, Identity("node", 123, 1)
        self.silent, self.state, self.reported, self.killed = 0.0, "", False, False
        self._from, self._until, self._seen, self._spent = silent_from, until, state, 0.0

    def tick(self, seconds: float) -> bool:
        self._spent += seconds
        if self._from < self._spent < self._until:
            self.silent, self.state = self.silent + seconds, self._seen
            return False
        self.silent, self.state = 0.0, ""
        return True

    def kill(self) -> None:
        self.killed = True


def waiting_for(said: list[str], *workers: Worker, **limits: float | None) -> calls.Waiting:
    waiting = calls.Waiting(WorkerTimeoutsConfig(**limits), said.append)
    waiting.watched = lambda: list(workers)  # type: ignore[method-assign, return-value]
    return waiting


def test_who_is_waited_for_is_said_after_a_minute_and_later_where_such_a_call_took_longer(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    said: list[str] = []
    waiting = waiting_for(said)
    Clock(monkeypatch, {"a": 65.0, "b": 400.0})
    results = waiting.wait_for({"a": ("rank-0", NOTHING), "b": ("rank-1", NOTHING)}, "train_step")  # type: ignore[dict-item]
    assert results == {"a": "of a", "b": "of b"}
    assert said == [
        "still waiting for rank-0, rank-1, after 60 s (train_step)",
        "still waiting for rank-1, after 360 s (train_step)",
    ]
    said.clear()
    Clock(monkeypatch, {"a": 700.0})
    waiting.wait_for({"a": ("rank-0", NOTHING)}, "train_step")  # type: ignore[dict-item]
    assert said == [], "the one before took 400 s"
    waiting.wait_for({"a": ("rank-0", NOTHING)}, "train_step")  # type: ignore[dict-item]
    Clock(monkeypatch, {"a": 700.0})
    waiting.wait_for({"a": ("rank-0", NOTHING)}, "save_hf")  # type: ignore[dict-item]
    assert [line[:40] for line in said] == [
        "still waiting for rank-0, after 60 s (sa",
        "still waiting for rank-0, after 360 s (s",
        "still waiting for rank-0, after 660 s (s",
    ]


def test_a_stopped_worker_is_said_and_is_lost_at_its_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    stopped = Worker("rank-1", silent_from=20)
    waiting = waiting_for(said, Worker("rank-0"), stopped)
    clock = Clock(monkeypatch, {"a": 1e9})
    with pytest.raises(
        LostWorkerError, match=r"rank-1 gave no sign of life for 120 s: its process 123 is stopped \(SIG"
    ):
        waiting.wait_for({"a": ("rank-0", NOTHING)}, "train_step")  # type: ignore[dict-item]
    assert stopped.killed
    assert clock.now == pytest.approx(1141, abs=2)
    assert said[0] == (
        "rank-1 gives no sign of life for 30 s: its process 123 is stopped (SIGSTOP); it is taken as lost after 120 s "
        "(worker_timeouts.stopped)"
    )


def test_a_worker_that_only_was_stopped_is_not_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    stopped = Worker("rank-1", silent_from=20, until=120)
    Clock(monkeypatch, {"a": 200.0})
    waiting_for(said, stopped).wait_for({"a": ("rank-1", NOTHING)})  # type: ignore[dict-item]
    assert not stopped.killed
    assert "rank-1 continues after 99 s without a sign of life" in said


@pytest.mark.parametrize(
    ("silent", "state", "seconds"),
    [(600.0, "running", 600), (600.0, "", 600), (600.0, "gone", 120), (None, "running", 0)],
)
def test_a_worker_whose_process_runs_has_longer(
    monkeypatch: pytest.MonkeyPatch, silent: float | None, state: str, seconds: int
) -> None:
    """Give it longer: a library call may keep Python from running."""
    said: list[str] = []
    waiting = waiting_for(said, Worker("rank-1", silent_from=0, state=state), silent=silent)
    Clock(monkeypatch, {"a": 3000.0})
    if not seconds:
        waiting.wait_for({"a": ("rank-1", NOTHING)})  # type: ignore[dict-item]
        return
    with pytest.raises(LostWorkerError, match=f"no sign of life for {seconds} s"):
        waiting.wait_for({"a": ("rank-1", NOTHING)})  # type: ignore[dict-item]


def test_a_call_has_a_limit_only_where_one_is_given_and_never_less_than_calls_took(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rank = Worker("rank-0")
    waiting = waiting_for([], rank, call=100.0)
    Clock(monkeypatch, {"a": 95.0})
    waiting.wait_for({"a": ("rank-0", NOTHING)}, "train_step")  # type: ignore[dict-item]
    Clock(monkeypatch, {"a": 240.0})
    waiting.wait_for({"a": ("rank-0", NOTHING)}, "train_step")  # type: ignore[dict-item]
    clock = Clock(monkeypatch, {"a": 1e9})
    with pytest.raises(LostWorkerError, match=r"rank-0 did not answer within .* s \(train_step\).*call is 100"):
        waiting.wait_for({"a": ("rank-0", NOTHING)}, "train_step")  # type: ignore[dict-item]
    assert rank.killed
    assert clock.now == pytest.approx(1000 + 2 * 240 + 60, abs=3)
    Clock(monkeypatch, {"a": 1e6})
    waiting_for([], Worker("rank-0")).wait_for({"a": ("rank-0", NOTHING)})  # type: ignore[dict-item]


def test_a_driver_that_was_stopped_itself_blames_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine that slept for an hour: every question is unanswered for as long."""
    watch = calls.Watch(waiting_for([], worker := Worker("rank-0", silent_from=0), call=60.0), "train_step")
    clock = Clock(monkeypatch, {})
    watch._looked = clock.now
    for seconds in (1.0, 3600.0, 1.0):
        clock.now += seconds
        watch.look(["rank-0"])
    assert worker.silent <= 4.0
    assert watch.spent <= 4.0


@pytest.mark.parametrize(("state", "seconds", "said"), [("gone", 0, "is gone"), ("stopped", 120, "stopped for 120 s")])
def test_rays_own_processes_are_watched(monkeypatch: pytest.MonkeyPatch, state: str, seconds: float, said: str) -> None:
    clock = Clock(monkeypatch, {"a": 1e9})
    killed: list[str] = []
    monkeypatch.setattr(calls, "vital", lambda: [Daemon("gcs_server", 7, state), Daemon("raylet", 8, "running")])
    monkeypatch.setattr(calls, "kill_all", lambda: killed.append("all"))
    with pytest.raises(LostWorkerError, match=rf"Ray's gcs_server .*{said}"):
        waiting_for([]).wait_for({"a": ("rank-0", NOTHING)})  # type: ignore[dict-item]
    assert clock.now - 1000 == pytest.approx(seconds, abs=1)
    assert clock.now == 1000 or seconds > 0, "before a call that would be answered at once"
    assert killed == ["all"]


def test_calls_are_taken_as_they_end_and_more_may_go_out(monkeypatch: pytest.MonkeyPatch) -> None:
    waiting, under_way = waiting_for([]), dict.fromkeys("abc", ("engine-0", NOTHING))
    clock = Clock(monkeypatch, {"a": 5.0, "b": 5.0, "c": 20.0, "d": 9.0})
    watch = waiting.watch("generate")
    taken = []
    while under_way:
        ended = waiting.take(under_way, watch)  # type: ignore[arg-type]
        taken.append(ended)
        under_way = {ref: worker for ref, worker in under_way.items() if ref not in ended}
        if len(taken) == 1:
            under_way["d"] = ("engine-1", NOTHING)
    assert taken == [{"a": "of a", "b": "of b"}, {"d": "of d"}, {"c": "of c"}], "all that have ended come together"
    assert clock.now == pytest.approx(1020, abs=1)


def test_a_take_ends_when_its_time_is_up(monkeypatch: pytest.MonkeyPatch) -> None:
    waiting = waiting_for([])
    clock = Clock(monkeypatch, {"a": 50.0})
    watch = waiting.watch("generate")
    for timeout in (0.0, 2.5):
        assert waiting.take({"a": ("engine-0", NOTHING)}, watch, timeout) == {}  # type: ignore[dict-item]
    assert clock.now == 1002.5


def test_a_result_begins_the_wait_for_the_next_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Engines that bring something every 50 seconds are neither reported nor lost, however long it takes in all."""
    said: list[str] = []
    waiting = waiting_for(said, Worker("engine-0"), call=55.0)
    Clock(monkeypatch, {str(i): 50.0 * (i + 1) for i in range(5)} | {"stuck": 1e9})
    under_way = dict.fromkeys([*map(str, range(5)), "stuck"], ("engine-0", NOTHING))
    watch = waiting.watch("generate")
    for _ in range(5):
        for ref in waiting.take(under_way, watch):  # type: ignore[arg-type]
            del under_way[ref]  # type: ignore[arg-type]
        watch.came()
    assert said == [] and waiting.longest("generate") == pytest.approx(50, abs=2)
    with pytest.raises(LostWorkerError, match=r"engine-0 did not answer within 16\d s \(generate\)"):
        waiting.take(under_way, watch)  # type: ignore[arg-type]
