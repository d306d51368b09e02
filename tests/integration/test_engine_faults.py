"""Dying, hanging and lying real engines: a step gets each of its samples once, from the right weights.

Most tests drive the engines as the pipeline does, without Ray and Megatron, to choose the moment of each fault. The
last tests run the whole program.
"""

from __future__ import annotations

import asyncio
import os
import re
import signal
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from engine_world import Kind, World, killed_under_its_requests
from faults import Fault, nothing_left
from rollout_cases import generate, group_members, requests
from sglang_cases import Engine, configuration
from whole_run import RAYS_LAST_WORD, START_TIMEOUT, Run, few_steps

from roll_r3.data.tiny_task import addition_mod10
from roll_r3.engines import folders as server_folders
from roll_r3.engines.sglang.weights import SglangWeightChannel
from roll_r3.errors import EngineError
from roll_r3.models.tiny import make_tiny_checkpoint

pytestmark = [pytest.mark.integration, pytest.mark.timeout(1200)]

HANG_TIMEOUT = 30.0
SGLANG = Kind(Engine, SglangWeightChannel, "scheduler")


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    here = tmp_path_factory.mktemp("world")
    old = make_tiny_checkpoint(here / "old", seed=0, norm_noise=0.0)
    new = make_tiny_checkpoint(here / "new", seed=5, norm_noise=0.0)
    config = configuration(old, "float32", response_length=24, max_concurrent_requests=8, hang_timeout=HANG_TIMEOUT)
    with nothing_left():
        world = World(SGLANG, config, new, here)
        try:
            yield world
        finally:
            world.close()


@pytest.mark.fault("a rollout server is killed while it generates")
def test_a_server_killed_under_its_requests_is_started_again(fault: Fault, world: World) -> None:
    killed_under_its_requests(fault, world)


@pytest.mark.long
@pytest.mark.fault("a rollout server hangs")
def test_a_server_that_hangs_is_killed_and_started_again(fault: Fault, world: World) -> None:
    struck = 0.0
    victims = group_members(world.server(1))

    def strike() -> None:
        nonlocal struck
        struck = time.monotonic()
        for process in victims:
            process.suspend()

    with world.answered(1, 5, strike):
        results = world.sample()
    seconds = time.monotonic() - struck
    world.assert_undisturbed(results, 1)
    assert world.restarted(1) == 1
    assert not any(p.is_running() and p.status() != psutil.STATUS_ZOMBIE for p in victims)
    assert re.search(
        r"engine 1 \(SGLang\) gave no sign of life for 30 s \(strategy_config\.hang_timeout\)", world.said[-2]
    )
    assert HANG_TIMEOUT <= world.said_at - struck < 2 * HANG_TIMEOUT + 10
    fault.user_sees("actor_infer-1 failed and is restarted (...): engine 1 (SGLang) gave no sign of life for 30 s ...")
    fault.recovered(seconds)
    fault.lost("nothing; missing samples are sampled again, with their seeds and weights")


@pytest.mark.long
@pytest.mark.fault("a rollout server answers garbage")
def test_an_engine_that_answers_garbage_is_started_again(fault: Fault, world: World) -> None:
    """Corrupt a real server's answers in transit: no real server corrupts them on demand."""
    client = world.rollouts.engines[0].rollout._client
    assert client is not None
    post = client.post

    async def spoilt(path: str, *arguments: Any) -> bytes:
        return (await post(path, *arguments)).replace(b'"routed_experts":"', b'"routed_experts":"AAAA')

    client.post = spoilt  # type: ignore[method-assign]
    began = time.monotonic()
    results = world.sample()
    fault.recovered(time.monotonic() - began)
    world.assert_undisturbed(results, 1)
    assert world.restarted(1) == 1
    seen = "engine 0 (SGLang) gave nothing usable: 32 samples of 8 prompts failed, with 3 retries each"
    assert seen in world.said[-2]
    fault.user_sees(f"actor_infer-0 failed and is restarted (...): {seen} ...; the last: routed_experts ...")
    fault.lost("nothing; all samples of that engine are sampled again")


@pytest.mark.long
@pytest.mark.fault("a rollout server is killed while it takes new weights")
def test_a_server_killed_in_an_update_is_started_again_and_all_get_the_weights(fault: Fault, world: World) -> None:
    struck = 0.0
    ports = [target.port for target in world.rollouts.weight_targets()]

    def strike() -> None:
        nonlocal struck
        world.trainer.half_way = lambda: None
        struck = time.monotonic()
        world.scheduler(1).kill()

    world.trainer.half_way = strike
    world.pool.update_weights(2)
    fault.recovered(time.monotonic() - struck)
    assert world.trainer.updates[-1] == 2
    world.assert_undisturbed(world.sample(), 2)
    assert not set(ports) & {target.port for target in world.rollouts.weight_targets()}, "half of the weights is no use"
    assert world.pool.step_done() == 2
    fault.user_sees("actor_infer-1 failed and is restarted (1 of 3 times ...): engine 1 (SGLang) died: ...")
    fault.lost("nothing; all engines of the update restart and get all weights")


@pytest.mark.long
def test_a_server_that_died_between_two_steps_is_found_by_the_update(world: World) -> None:
    survivor = world.rollouts.weight_targets()[0].port
    os.killpg(world.server(1).pid, signal.SIGKILL)
    world.rollouts.each(lambda engine, _: asyncio.wait_for(asyncio.shield(engine.rollout._process.death), 10), [1])
    world.pool.update_weights(3)
    assert world.pool.step_done() == 1
    assert world.rollouts.weight_targets()[0].port == survivor, "it left the old group and joined the new one"
    world.assert_undisturbed(world.sample(), 3)


@pytest.mark.long
def test_a_server_started_again_answers_nothing_before_its_weights_are_back(world: World) -> None:
    """Last test of these engines."""
    rollout = world.rollouts.engines[0].rollout
    world.rollouts.each(lambda engine, _: engine.rollout.restart(), [0])
    with pytest.raises(EngineError, match="has the checkpoint's weights: an update comes first"):
        world.rollouts.each(lambda engine, _: generate(engine.rollout, requests(1, 1)), [0])
    assert rollout._sampler.weight_version == 0


def servers(run: Run) -> list[psutil.Process]:
    """Return the engine's processes."""
    return [p for p in run.descendants() if "sglang" in p.name().lower() or "launcher.py" in " ".join(p.cmdline())]


def wait_for_requests(run: Run) -> None:
    """Wait until the engine has begun new requests since the call."""
    log = run.path / "logs" / "actor_infer-0-server.log"
    begun, deadline = log.read_text().count("Prefill batch"), time.monotonic() + START_TIMEOUT
    while log.read_text().count("Prefill batch") < begun + 2:
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.mark.long
@pytest.mark.fault("a rollout server of a whole run is killed while it generates")
def test_a_run_whose_engine_is_killed_goes_on(fault: Fault, tmp_path: Path) -> None:
    checkpoint = make_tiny_checkpoint(tmp_path / "tiny", examples=addition_mod10(), warm_start_steps=20)
    settings = "{max_running_requests: 8, max_total_tokens: 2048, max_restarts: 1}"
    more = ("response_length=24", f"actor_infer.strategy_args.strategy_config={settings}")
    with nothing_left():
        run = Run(tmp_path, checkpoint, *few_steps(3, *more))
        try:
            run.wait_for_step(1)
            wait_for_requests(run)
            struck, victims = time.monotonic(), servers(run)
            (scheduler,) = [p for p in victims if "scheduler" in p.name() + " ".join(p.cmdline())]
            scheduler.kill()
            had = len(run.metrics())
            run.wait_for_step(had + 1)
            fault.recovered(time.monotonic() - struck)
            assert run.finish(START_TIMEOUT) == 0, run.stderr.read_text()
            said, metrics = run.stderr.read_text(), run.metrics()
        finally:
            run.end()
    print(said, metrics)
    assert [m["step"] for m in metrics] == [1, 2, 3]
    assert sum(m["rollout/engine_restarts"] for m in metrics) == 1
    assert metrics[had]["rollout/engine_restarts"] == 1
    for m in metrics:
        assert m["router_replay/coverage"] == 1.0
        assert m["rollout/dropped_samples"] == 0
        assert m["actor/rollout_train_logprobs_abs_diff_mean"] < 0.1, "sampled from the trainer's weights"
    assert [m["system/samples"] for m in metrics] == [128, 256, 384], "all samples of every step"
    assert re.search(r"actor_infer-0 failed and is restarted \(1 of 1 times .*engine 0 \(SGLang\) died", said)
    assert "LOST" not in said
    fault.user_sees("actor_infer-0 failed and is restarted (1 of 1 times ...); rollout/engine_restarts is 1")
    fault.lost("nothing; missing samples are sampled again")


def generating(where: Path) -> Run:
    """Return a run after its first step, with its server generating."""
    checkpoint = make_tiny_checkpoint(where / "tiny", examples=addition_mod10(), warm_start_steps=20)
    settings = "{max_running_requests: 8, max_total_tokens: 2048}"
    more = ("response_length=24", "save_steps=50", f"actor_infer.strategy_args.strategy_config={settings}")
    run = Run(where, checkpoint, *few_steps(50, *more))
    try:
        run.wait_for_step(1)
        wait_for_requests(run)
    except BaseException:
        run.end()
        raise
    return run


def folders(run: Run) -> list[Path]:
    """Return directories of servers launched by the run's newest worker."""
    log = (run.path / "logs" / "actor_infer-0.log").read_text()
    worker = re.findall(r"is process (\d+)", log)[-1]
    return list(Path(tempfile.gettempdir()).glob(f"roll_r3-server-*-{worker}-*"))


@pytest.mark.long
@pytest.mark.fault("SIGTERM while a rollout server generates")
def test_sigterm_while_a_server_generates_leaves_nothing(fault: Fault, tmp_path: Path) -> None:
    with nothing_left():
        run = generating(tmp_path)
        try:
            assert servers(run) and len(folders(run)) == 1
            struck = time.monotonic()
            run.process.send_signal(signal.SIGTERM)
            assert run.finish(120) == 128 + signal.SIGTERM, run.stderr.read_text()
            fault.recovered(time.monotonic() - struck)
            assert folders(run) == []
        finally:
            run.end()
    said = run.stderr.read_text()
    done = int(re.search(r"SIGTERM: leaving after step (\d+)", said)[1])  # type: ignore[index]
    assert len(run.metrics()) == done
    assert f"step-{done:08d} in" in said
    fault.user_sees("SIGTERM: leaving after step ...; saved .../step-...; exit status 143")
    fault.lost("nothing; what was sampled for the next step is sampled again")


@pytest.mark.long
@pytest.mark.fault("the driver is killed with kill -9 while a rollout server generates")
def test_a_server_whose_driver_is_killed_ends_by_itself(fault: Fault, tmp_path: Path) -> None:
    run = generating(tmp_path)
    try:
        victims = servers(run)
        assert victims
        struck = time.monotonic()
        run.process.kill()
        run.process.wait()
        _, alive = psutil.wait_procs(victims, timeout=60)
        assert alive == []
        fault.recovered(time.monotonic() - struck)
        # The next server launched on this machine removes the files named in its directory, and the directory.
        named = [path for folder in folders(run) for path in (folder / "shared_memory").read_text().splitlines()]
        left = set(run.started.left(RAYS_LAST_WORD)) - {f"shared memory {path}" for path in named}
        assert not left, "left behind:\n" + "\n".join(left)
        server_folders.remove_orphaned()
        assert folders(run) == [] and not any(os.path.exists(path) for path in named)
    finally:
        run.end()
    fault.user_sees("nothing; the server and its children end by themselves, the next one there tidies up")
    fault.lost("nothing; steps since the last checkpoint are done again")
