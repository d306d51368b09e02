"""Failing workers in real Ray actors: the error names the right worker, and comes in time."""

from __future__ import annotations

import os
import signal
import threading
import time
from pathlib import Path

import pytest
import ray

from roll_r3.cluster.calls import Waiting
from roll_r3.cluster.daemons import process_state
from roll_r3.cluster.life_signs import SIGNS, Identity, identity
from roll_r3.cluster.logs import log_to_file
from roll_r3.config.sections import WorkerTimeoutsConfig
from roll_r3.errors import EngineError, LostWorkerError, WorkerError

pytestmark = pytest.mark.integration


class Peer:
    def __init__(self, log) -> None:
        log_to_file(log)
        print("hello from the worker", flush=True)

    def pid(self) -> int:
        return os.getpid()

    def sleep(self, seconds: float) -> str:
        time.sleep(seconds)
        return "slept"

    @ray.method(concurrency_group=SIGNS)
    def alive(self) -> Identity:
        return identity()

    def fail_later(self, seconds: float, kind: str) -> None:
        time.sleep(seconds)
        raise EngineError("the engine said no") if kind == "ours" else RuntimeError("connection closed by peer")


@pytest.fixture(scope="module", autouse=True)
def local_ray():
    here = {"env_vars": {"PYTHONPATH": str(Path(__file__).parent)}}  # workers import this module for `Peer`
    quiet = {"include_dashboard": False, "log_to_driver": False, "logging_level": "ERROR"}
    ray.init(address="local", num_cpus=4, _node_ip_address="127.0.0.1", runtime_env=here, **quiet)
    yield
    ray.shutdown()


@pytest.fixture
def peers(tmp_path):
    logs = [tmp_path / f"peer-{i}.log" for i in range(2)]
    actors = [ray.remote(concurrency_groups={SIGNS: 1})(Peer).options(num_cpus=0.1).remote(log) for log in logs]
    pids = ray.get([a.pid.remote() for a in actors])
    yield actors, logs, pids
    for actor in actors:
        ray.kill(actor)


def test_a_killed_worker_is_named_with_its_log_although_its_peer_failed_first(peers):
    actors, logs, pids = peers
    calls = {
        actors[0].fail_later.remote(0.3, "theirs"): ("rank-0", logs[0]),
        actors[1].sleep.remote(60): ("rank-1", logs[1]),
    }
    time.sleep(1)
    os.kill(pids[1], signal.SIGKILL)
    start = time.monotonic()
    with pytest.raises(WorkerError, match=r"(?s)rank-1 died \(and, because of it or beside it, rank-0\).*hello from"):
        Waiting().wait_for(calls)
    assert time.monotonic() - start < 10


def test_an_error_of_ours_is_shown_as_it_is(peers):
    actors, logs, _ = peers
    calls = {
        actors[0].fail_later.remote(0, "theirs"): ("rank-0", logs[0]),
        actors[1].fail_later.remote(0.5, "ours"): ("rank-1", logs[1]),
    }
    with pytest.raises(WorkerError, match=r"rank-1 failed .*rank-0\): the engine said no$"):
        Waiting().wait_for(calls)


def test_a_foreign_error_comes_with_the_log(peers):
    actors, logs, _ = peers
    with pytest.raises(WorkerError, match=r"(?s)RuntimeError: connection closed by peer.*hello from the worker"):
        Waiting().wait_for({actors[0].fail_later.remote(0, "theirs"): ("rank-0", logs[0])})


def test_results_come_back_by_reference(peers):
    actors, logs, _ = peers
    ref = actors[0].sleep.remote(0)
    assert Waiting().wait_for({ref: ("rank-0", logs[0])}) == {ref: "slept"}


def waiting_for(peers, said: list[str], **limits: float | None) -> Waiting:
    waiting = Waiting(WorkerTimeoutsConfig(**limits), said.append)
    for i, (actor, log) in enumerate(zip(*peers[:2], strict=True)):
        waiting.add(f"rank-{i}", actor, log)
    return waiting


def test_a_worker_that_is_stopped_for_good_is_killed_and_lost_and_a_busy_one_is_not(peers):
    actors, logs, pids = peers
    said: list[str] = []
    waiting = waiting_for(peers, said, stopped=4.0, silent=60.0)
    waiting.meet()
    waiting.wait_for({actors[0].sleep.remote(7): ("rank-0", logs[0])}, "sleep")  # answers while it works
    assert said == []
    calls = {actors[i].sleep.remote(60): (f"rank-{i}", logs[i]) for i in (0, 1)}
    os.kill(pids[1], signal.SIGSTOP)  # before its first sign of life is requested in this wait
    start = time.monotonic()
    with pytest.raises(LostWorkerError, match=rf"rank-1 gave no sign of life .* process {pids[1]} is stopped"):
        waiting.wait_for(calls, "sleep")
    assert time.monotonic() - start < 4 + 10
    assert f"its process {pids[1]} is stopped (SIGSTOP); it is taken as lost after 4 s" in said[0]
    deadline = time.monotonic() + 10
    while process_state(pids[1]) != "gone":
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_a_worker_that_is_stopped_for_a_while_goes_on(peers):
    actors, logs, pids = peers
    said: list[str] = []
    call = actors[0].sleep.remote(10)
    threading.Timer(3, os.kill, (pids[0], signal.SIGSTOP)).start()
    threading.Timer(8, os.kill, (pids[0], signal.SIGCONT)).start()
    waiting = waiting_for(peers, said, stopped=12.0, silent=12.0)
    assert waiting.wait_for({call: ("rank-0", logs[0])}) == {call: "slept"}
    assert process_state(pids[0]) == "running"
