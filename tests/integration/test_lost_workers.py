"""Whole runs with a lost worker, a lost node or a signal end with undisturbed results."""

from __future__ import annotations

import os
import re
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from faults import Fault, nothing_left
from ray.cluster_utils import Cluster
from whole_run import SAMPLED_TO_THE_BIT, START_TIMEOUT, Run, few_steps, finished, learned

from roll_r3.data.tiny_task import addition_mod10
from roll_r3.models.tiny import make_tiny_checkpoint

pytestmark = [pytest.mark.integration, pytest.mark.timeout(1200)]

STEPS = 5
IN_PROCESS = (
    *few_steps(STEPS),
    *SAMPLED_TO_THE_BIT,
    "actor_train.strategy_args.strategy_name=megatron_train",
)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("checkpoint") / "tiny"
    return make_tiny_checkpoint(path, examples=addition_mod10(), warm_start_steps=60)


def start(where: Path, checkpoint: Path, *more: str) -> Run:
    return Run(where, checkpoint, *IN_PROCESS, *more, config="quickstart_engines")


@pytest.fixture(scope="module")
def whole(tmp_path_factory, checkpoint) -> Run:
    """Undisturbed run."""
    return finished(start(tmp_path_factory.mktemp("whole"), checkpoint))


def process_of(run: Run, worker: str) -> int:
    """Return the process id of a worker's newest process, from its log."""
    log = (run.path / "logs" / f"{worker}.log").read_text()
    return int(re.findall(r"is process (\d+)", log)[-1])


def wait_until_it_says(run: Run, text: str, timeout: float = 2 * START_TIMEOUT) -> None:
    deadline = time.monotonic() + timeout
    while text not in run.stderr.read_text():
        assert run.process.poll() is None, run.stderr.read_text()
        assert time.monotonic() < deadline, run.stderr.read_text()
        time.sleep(0.1)


def wait_for_stage(run: Run, stage: str) -> None:
    while stage not in (run.path / "logs" / "driver.log").read_text():
        assert run.process.poll() is None, run.stderr.read_text()
        time.sleep(0.002)


def kill(run: Run, worker: str, stage: str) -> None:
    """Kill a worker; with a stage, in that stage of the fourth step, before the ranks have done any work of it."""
    held = [process_of(run, f"actor_train-{rank}") for rank in (0, 1)] if stage else []
    if stage:
        wait_for_stage(run, "step 4: rollout")
        for rank in held:  # they have no work yet
            os.kill(rank, signal.SIGSTOP)
        wait_for_stage(run, f"step 4: {stage}")
    os.kill(process_of(run, worker), signal.SIGKILL)
    if stage:
        time.sleep(1)  # Ray notices the death
    for rank in held:
        os.kill(rank, signal.SIGCONT)


def seconds_to_recover(run: Run, strike: Callable[[], object]) -> float:
    """Break something after the third step; return the seconds until the run has made one more step."""
    run.wait_for_step(3)
    struck = time.monotonic()
    strike()
    wait_until_it_says(run, "resuming after step")
    had = len(run.metrics())
    run.wait_for_step(had + 1)
    return time.monotonic() - struck


def assert_as_undisturbed(run: Run, whole: Run) -> None:
    assert run.finish(START_TIMEOUT) == 0, run.stderr.read_text()
    assert [row["step"] for row in run.metrics()] == list(range(1, STEPS + 1)), "none lost, none twice"
    assert learned(run) == learned(whole), "to the bit"


@pytest.mark.parametrize(
    ("worker", "stage", "lost", "save_steps", "goes_on"),
    [
        # another rank may be named with it
        pytest.param(
            "actor_train-1",
            "",
            "actor_train-1 died.*: its process is gone",
            2,
            "2",
            marks=pytest.mark.fault("a training rank is killed"),
        ),
        pytest.param(
            "actor_infer-0",
            "",
            "actor_infer-0 died: its process is gone",
            1,
            r"\d",
            marks=[pytest.mark.fault("the worker of an engine is killed"), pytest.mark.long],
        ),
        pytest.param(
            "actor_infer-0",
            "old log-probs",
            r"actor_train-\d failed.*: routes are lost, since the process that stored them ended",
            1,
            "3",
            marks=[pytest.mark.fault("the worker of an engine is killed while a step trains"), pytest.mark.long],
        ),
    ],
)
def test_a_killed_worker_is_started_anew(
    fault: Fault, whole, tmp_path, checkpoint, monkeypatch, worker, stage, lost, save_steps, goes_on
):
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]))
    slow = "rewards.default.reward=slow_reward:exact_match_slowly"  # makes the stage long enough to be hit
    with nothing_left():
        run = start(tmp_path, checkpoint, f"save_steps={save_steps}", slow)
        try:
            fault.recovered(seconds_to_recover(run, lambda: kill(run, worker, stage)))
            assert_as_undisturbed(run, whole)
        finally:
            run.end()
    said = run.stderr.read_text()
    assert re.search(f"LOST: {lost}", said)
    going_on = re.search(rf"resuming after step ({goes_on}), from .*step-0000000\1 \(restart 1 of at most 3\)", said)
    assert going_on
    assert "Traceback (most recent call last)" not in re.sub(r"(?s)--- end of.*?---", "", said)
    what = f"{worker} died, with the end of its log" if not stage else "actor_train-... failed: routes are lost, ..."
    fault.user_sees(f"LOST: {what}; resuming after step {going_on[1]} (restart 1 of at most 3)")
    fault.lost("nothing; steps since the last checkpoint are done again, to the bit")


@pytest.mark.fault("a training rank is stopped (SIGSTOP), for good")
def test_a_stopped_worker_is_waited_for_and_then_started_anew(fault: Fault, whole, tmp_path, checkpoint):
    """Also close the terminal, and stop a worker for a short time: neither changes anything."""
    with nothing_left():
        run = start(tmp_path, checkpoint, "save_steps=1", "worker_timeouts.stopped=10")
        try:
            run.wait_for_step(1)
            os.killpg(run.process.pid, signal.SIGHUP)
            brief = process_of(run, "actor_infer-0")
            os.kill(brief, signal.SIGSTOP)
            time.sleep(4)
            os.kill(brief, signal.SIGCONT)
            run.wait_for_step(2)
            assert "LOST" not in run.stderr.read_text()
            stopped = process_of(run, "actor_train-1")

            def strike() -> None:
                os.kill(stopped, signal.SIGSTOP)
                began = time.monotonic()
                wait_until_it_says(run, "LOST: ")
                assert time.monotonic() - began < 10 + 15, "the limit, and what it takes to ask and to look"

            fault.recovered(seconds_to_recover(run, strike))
            assert_as_undisturbed(run, whole)
        finally:
            run.end()
    said = run.stderr.read_text()
    found = rf"its process {stopped} is stopped \(SIGSTOP\)"
    assert re.search(rf"actor_train-1 gives no sign of life for \d+ s: {found}; it is taken as lost after 10 s", said)
    assert re.search(rf"LOST: actor_train-1 gave no sign of life for 1\d s: {found}", said)
    assert said.count("(restart") == 1
    fault.user_sees(
        "actor_train-1 gives no sign of life for ... s: its process ... is stopped (SIGSTOP); ...; LOST: actor_train-1 "
        "...; resuming after step ... (restart 1 of at most 3)"
    )
    fault.lost("nothing; steps since the last checkpoint are done again, to the bit")


@pytest.mark.long
@pytest.mark.parametrize(
    ("daemon", "number", "lost"),
    [
        pytest.param(
            "gcs_server",
            signal.SIGKILL,
            "Ray's gcs_server is gone",
            marks=pytest.mark.fault("Ray's gcs_server is killed"),
        ),
        pytest.param(
            "raylet",
            signal.SIGSTOP,
            "Ray's raylet has been stopped for 1\\d s",
            marks=pytest.mark.fault("Ray's raylet is stopped (SIGSTOP), for good"),
        ),
    ],
)
def test_ray_itself_is_started_anew(fault: Fault, whole, tmp_path, checkpoint, daemon, number, lost):
    with nothing_left():
        run = start(tmp_path, checkpoint, "save_steps=1", "worker_timeouts.stopped=15")
        try:

            def strike() -> None:
                next(p for p in run.descendants() if p.name() == daemon).send_signal(number)
                wait_until_it_says(run, "LOST: ")

            fault.recovered(seconds_to_recover(run, strike))
            assert_as_undisturbed(run, whole)
        finally:
            run.end()
    said = run.stderr.read_text()
    assert re.search(f"LOST: {lost}", said)
    assert said.count("(restart") == 1
    fault.user_sees(f"LOST: Ray's {daemon} ...; resuming after step ... (restart 1 of at most 3)")
    fault.lost("nothing; steps since the last checkpoint are done again, to the bit")


@pytest.mark.long
@pytest.mark.fault("SIGTERM while Ray's raylet is stopped (SIGSTOP)")
def test_sigterm_ends_a_run_whose_ray_hangs(fault: Fault, tmp_path, checkpoint):
    with nothing_left():
        run = start(tmp_path, checkpoint, "save_steps=1", "max_steps=500", "sigterm_grace_period=20")
        try:
            run.wait_for_step(2)
            next(p for p in run.descendants() if p.name() == "raylet").send_signal(signal.SIGSTOP)
            struck = time.monotonic()
            run.process.send_signal(signal.SIGTERM)
            assert run.finish(20 + 5) == 128 + signal.SIGTERM, run.stderr.read_text()
            fault.recovered(time.monotonic() - struck)
        finally:
            run.end()
    done = int(re.search(r"SIGTERM: leaving after step (\d+)", run.stderr.read_text())[1])
    assert f"step-{done:08d} in" in run.stderr.read_text()
    fault.user_sees("SIGTERM: leaving after step ...; saved .../step-...; exit status 143 within the grace period")
    fault.lost("nothing; what was sampled for the next step is sampled again")


@pytest.mark.long
@pytest.mark.fault("SIGTERM")
def test_sigterm_saves_the_newest_step_and_leaves(fault: Fault, whole, tmp_path, checkpoint):
    with nothing_left():
        run = start(tmp_path, checkpoint, "save_steps=50")
        try:
            run.wait_for_step(2)
            struck = time.monotonic()
            run.process.send_signal(signal.SIGTERM)
            assert run.finish(60) == 128 + signal.SIGTERM
            fault.recovered(time.monotonic() - struck)
        finally:
            run.end()
    said = run.stderr.read_text()
    done = int(re.search(r"SIGTERM: leaving after step (\d)", said)[1])
    assert len(run.metrics()) == done
    assert f"step-{done:08d} in" in said, "saved, although no checkpoint was due"
    with nothing_left():
        again = start(tmp_path, checkpoint, "resume_from_checkpoint=auto", "save_steps=1")
        try:
            again.wait_for_step(done + 1)
            os.killpg(again.process.pid, signal.SIGTERM)
            assert again.finish(60) != 0, "Ray's own processes are gone too, and it ends with them"
        finally:
            again.end()
    said = again.stderr.read_text()
    assert f"resuming after step {done}" in said
    assert "(restart" not in said, "workers ended by the same signal are not a fault to resume from"
    last = start(tmp_path, checkpoint, "resume_from_checkpoint=auto")
    try:
        assert_as_undisturbed(last, whole)
    finally:
        last.end()
    fault.user_sees("SIGTERM: leaving after step 2; saved .../step-00000002; exit status 143")
    fault.lost("nothing; what was sampled for the next step is sampled again")


@pytest.fixture
def cluster(monkeypatch) -> Iterator[Cluster]:
    """Two nodes; a run started meanwhile joins them."""
    nodes = Cluster(initialize_head=True, head_node_args={"num_cpus": 2, "include_dashboard": False})
    nodes.add_node(num_cpus=1)
    monkeypatch.setenv("RAY_ADDRESS", nodes.address)
    yield nodes
    nodes.shutdown()


@pytest.mark.long
@pytest.mark.fault("a node of the Ray cluster is lost")
def test_a_lost_node_is_waited_for(fault: Fault, whole, tmp_path, checkpoint, cluster):
    """Lose the engine's node at once; another node joins later."""
    run = start(tmp_path, checkpoint, "save_steps=1", "actor_infer.device_mapping=[2]")
    try:

        def strike() -> None:
            cluster.remove_node(next(iter(cluster.worker_nodes)), allow_graceful=False)
            wait_until_it_says(run, "resuming after step")
            time.sleep(3)
            assert run.process.poll() is None, "it waits"
            cluster.add_node(num_cpus=1)

        fault.recovered(seconds_to_recover(run, strike))
        assert_as_undisturbed(run, whole)
    finally:
        run.end()
    assert "LOST: " in run.stderr.read_text()
    fault.user_sees("LOST: actor_infer-0 died; going on ...; it waits for a node to join in the place of the lost one")
    fault.lost("nothing; steps since the last checkpoint are done again, to the bit")
