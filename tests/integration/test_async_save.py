"""Whole runs with checkpoints written beside their steps: equal to the bit to runs that wait for them."""

from __future__ import annotations

import os
import re
import resource
import signal
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
from faults import Fault, nothing_left
from megatron_cases import assert_same_tensors
from whole_run import SAMPLED_TO_THE_BIT, START_TIMEOUT, Run, few_steps, finished, learned

from roll_r3.data.tiny_task import addition_mod10
from roll_r3.models.tiny import make_tiny_checkpoint
from roll_r3.saving.manifest import verify

pytestmark = [pytest.mark.integration, pytest.mark.timeout(1200)]

STEPS = 4
BESIDE = "checkpoint_config.async_save=true"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("checkpoint") / "tiny"
    return make_tiny_checkpoint(path, examples=addition_mod10(), warm_start_steps=60)


def start(where: Path, checkpoint: Path, trainer: str, *more: str) -> Run:
    return Run(
        where,
        checkpoint,
        *few_steps(STEPS),
        *SAMPLED_TO_THE_BIT,
        f"actor_train.strategy_args.strategy_name={trainer}",
        "save_steps=1",
        *more,
        config="quickstart_engines",
    )


@pytest.fixture(scope="module")
def waiting(tmp_path_factory, checkpoint) -> Callable[[str], Run]:
    """Run of a trainer that waits for its checkpoints."""
    runs: dict[str, Run] = {}

    def of(trainer: str) -> Run:
        if trainer not in runs:
            runs[trainer] = finished(start(tmp_path_factory.mktemp(trainer), checkpoint, trainer))
        return runs[trainer]

    return of


def wait_for(happens: Callable[[], bool], run: Run) -> None:
    deadline = time.monotonic() + START_TIMEOUT
    while not happens():
        assert run.process.poll() is None, run.stderr.read_text()
        assert time.monotonic() < deadline, run.stderr.read_text()
        time.sleep(0.001)


def process_of(run: Run, worker: str) -> int:
    log = (run.path / "logs" / f"{worker}.log").read_text()
    return int(re.findall(r"is process (\d+)", log)[-1])


@pytest.mark.parametrize("trainer", ["megatron_train", pytest.param("fsdp2_train", marks=pytest.mark.long)])
def test_it_trains_and_writes_what_a_run_that_waits_does(trainer, waiting, tmp_path, checkpoint):
    wanted, run = waiting(trainer), finished(start(tmp_path, checkpoint, trainer, BESIDE))
    assert learned(run) == learned(wanted)
    for step in range(1, STEPS + 1):
        found, known = (each.path / "checkpoints" / f"step-{step:08d}" for each in (run, wanted))
        verify(found)
        assert_same_tensors(found / "trainer", known / "trainer")
        assert len((found / "metrics.jsonl").read_text().splitlines()) == step
    waited = [[row["time/step_save"] for row in each.metrics()] for each in (run, wanted)]
    print(f"{trainer}: waited {waited[0]}, without async_save {waited[1]}")
    assert waited[0][0] == waited[1][0] == 0
    assert all(seconds > 0 for row in waited for seconds in row[1:])


@pytest.mark.long
@pytest.mark.fault("kill -9 while a checkpoint is written beside a step")
def test_a_run_that_is_killed_while_it_writes_goes_on_from_the_checkpoint_before(
    fault: Fault, waiting, tmp_path, checkpoint
):
    trainer = "megatron_train"
    run = start(tmp_path, checkpoint, trainer, BESIDE)
    processes: list[psutil.Process] = []
    try:
        run.wait_for_step(1)
        folder = run.path.resolve() / "checkpoints"
        processes = run.descendants()  # their own end is tested where a run that waits is killed
        wait_for(lambda: any(folder.glob(".step-0000000[23].partial/trainer.partial")), run)
        os.kill(run.process.pid, signal.SIGKILL)
        run.process.wait()
        psutil.wait_procs(processes, timeout=20)
    finally:
        run.end()
        for process in processes:
            with suppress(psutil.NoSuchProcess):
                process.kill()
    there = sorted(path.name for path in folder.iterdir())
    half = [name for name in there if name.startswith(".")]
    whole = [name for name in there if not name.startswith(".")]
    last = len(whole)
    assert half == [f".step-{last + 1:08d}.partial"], "what was being written has no name"
    for name in whole:
        verify(folder / name)
    assert [int(step) for step in re.findall(r"saved .*/step-(\d+) in", run.stderr.read_text())] == list(
        range(1, last + 1)
    )

    began = time.monotonic()
    again = start(tmp_path, checkpoint, trainer, BESIDE, "resume_from_checkpoint=auto")
    try:
        # the rows of repeated steps are there until the run resumes
        wait_for(lambda: "resuming after step" in again.stderr.read_text() and len(again.metrics()) > last, again)
        fault.recovered(time.monotonic() - began)
    finally:
        finished(again)
    assert f"resuming after step {last}, from" in again.stderr.read_text()
    assert learned(again) == learned(waiting(trainer))
    assert sorted(path.name for path in folder.iterdir()) == [f"step-{step:08d}" for step in range(1, STEPS + 1)]
    fault.user_sees("nothing; started again with resume_from_checkpoint: auto: resuming after step 1")
    fault.lost("nothing; the step of that checkpoint is done again, to the bit")


@pytest.mark.long
@pytest.mark.fault("a disk fills up while a checkpoint is written beside a step")
def test_a_full_disk_ends_a_run_that_does_not_wait(fault: Fault, tmp_path, checkpoint):
    """Limit the size of one rank's files, as on a full disk."""
    with nothing_left():
        run = start(tmp_path, checkpoint, "megatron_train", BESIDE, "max_steps=50")
        try:
            wait_for(lambda: "saved" in run.stderr.read_text(), run)
            rank = process_of(run, "actor_train-1")
            resource.prlimit(rank, resource.RLIMIT_FSIZE, (500_000, resource.RLIM_INFINITY))
            began = time.monotonic()
            assert run.finish(START_TIMEOUT) == 1
            fault.recovered(time.monotonic() - began)
        finally:
            run.end()
    said = run.stderr.read_text()
    found = re.search(r"step (\d+) was not saved: .* was not written: rank 1: .*File too large", said)
    assert found, said
    failed = int(found[1])
    assert f"there is step 1{''.join(f', step {step}' for step in range(2, failed))}, and" in said
    assert len(run.metrics()) <= failed + 1, "the step after it is the last"
    folder = run.path / "checkpoints"
    assert sorted(path.name for path in folder.iterdir()) == [f"step-{step:08d}" for step in range(1, failed)]
    verify(folder / f"step-{failed - 1:08d}")
    fault.user_sees("step 3 was not saved: ... rank 1: File too large; the run stops here; ... there is step 1, step 2")
    fault.lost("the steps since the last checkpoint")
