"""Real engines that die, hang or answer garbage: a step gets all of its samples, of its own weights, each once.

Most tests drive the engines as the pipeline does, without Ray and Megatron, so that each fault comes at the moment that
it is about; the whole program is in the last one.
"""

from __future__ import annotations

import asyncio
import os
import re
import signal
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from faults import Fault, nothing_left
from rollout_cases import Reference, group_members, requests, trajectories
from safetensors.torch import load_file
from sglang_cases import Engine, configuration
from whole_run import RAYS_LAST_WORD, START_TIMEOUT, Run, few_steps

from roll_r3.config.pipeline import RLVRConfig
from roll_r3.data.tiny_task import addition_mod10
from roll_r3.errors import EngineError
from roll_r3.models.tiny import make_tiny_checkpoint
from roll_r3.pipelines.engines import Engines
from roll_r3.strategies.base import GenerateRequest, GenerateResult
from roll_r3.strategies.rollout.process import _remove_what_is_orphaned
from roll_r3.strategies.rollout.sglang.weights import SglangWeightChannel

pytestmark = [pytest.mark.integration, pytest.mark.timeout(1200)]

HANG_TIMEOUT = 30.0
ASKED = requests(16, 4)


class Rollouts:
    """Two engines, each in a thread with a loop of its own, behind the methods of `cluster.groups.RolloutGroup`."""

    def __init__(self, config: RLVRConfig, log_dir: Path) -> None:
        self.engines = [Engine(config, log_dir / f"server{i}.log", engine_index=i) for i in (0, 1)]
        self.threads = []
        for engine in self.engines:
            # one thread for the engine's whole life: its server dies with the thread that launched it
            thread = threading.Thread(target=engine.loop.run_forever, daemon=True)
            thread.start()
            self.threads.append(thread)

    names = ("actor_infer-0", "actor_infer-1")

    def each(self, call: Callable[[Engine, int], Any], which: Collection[int] = (0, 1)) -> list[Any]:
        futures = [asyncio.run_coroutine_threadsafe(call(self.engines[i], i), self.engines[i].loop) for i in which]
        return [future.result(600) for future in futures]

    def generate(self, asked: Sequence[GenerateRequest]) -> list[GenerateResult]:
        answers = self.each(lambda engine, i: engine.rollout.generate(list(asked[i::2])))
        return [answers[i % 2][i // 2] for i in range(len(asked))]

    def down(self, *, ask: bool) -> dict[str, str]:
        reasons = self.each(lambda engine, _: engine.rollout.why_down(ask=ask))
        return {name: why for name, why in zip(self.names, reasons, strict=True) if why}

    def restart(self, names: Collection[str]) -> dict[str, str]:
        self.each(lambda engine, _: engine.rollout.restart(), [self.names.index(name) for name in sorted(names)])
        return {}

    def weight_targets(self) -> list[Any]:
        return [engine.rollout.weight_target() for engine in self.engines]

    def weights_updated(self, version: int) -> None:
        self.each(lambda engine, _: engine.rollout.on_weights_updated(version))

    def close(self) -> None:
        self.each(lambda engine, _: engine.rollout.stop())
        for engine, thread in zip(self.engines, self.threads, strict=True):
            engine.loop.call_soon_threadsafe(engine.loop.stop)
            thread.join()
            engine.loop.close()


class Trainer:
    """Sends a checkpoint's weights as `cluster.workers.ModelWorker` does; `half_way` is called in between."""

    def __init__(self, weights: dict[str, torch.Tensor]) -> None:
        self.weights = weights
        self.channel: SglangWeightChannel | None = None
        self.half_way: Callable[[], None] = lambda: None
        self.updates: list[int] = []

    def connect_engines(self, targets: Sequence[Any]) -> None:
        self.close()
        self.channel = SglangWeightChannel(targets, device="cpu", timeout_s=60.0)

    def update_weights(self, version: int) -> str:
        assert self.channel is not None
        weights = list(self.weights.items())
        try:
            self.channel.begin(version)
            self.channel.send(weights[:40])
            self.half_way()
            self.channel.send(weights[40:])
            self.channel.end()
        except EngineError as error:
            return str(error)
        self.updates.append(version)
        return ""

    def close(self) -> None:
        if self.channel is not None:
            self.channel.close()


class World:
    """Engines that were given weights other than those they started with."""

    def __init__(self, config: RLVRConfig, trained: Path, log_dir: Path) -> None:
        self.said: list[str] = []
        self.said_at = 0.0
        self.reference = Reference(trained)
        self.rollouts, self.trainer = Rollouts(config, log_dir), Trainer(load_file(trained / "model.safetensors"))
        self.rollouts.each(lambda engine, _: engine.rollout.start())
        self.engines = Engines(config, self.rollouts, self.trainer, self._say)  # type: ignore[arg-type]
        self.engines.send_weights(1)

    def _say(self, text: str) -> None:
        self.said.append(text)
        if "failed" in text:
            self.said_at = time.monotonic()

    def assert_undisturbed(self, results: Sequence[GenerateResult], version: int) -> None:
        """Every sample once, in the order asked for, and sampled from the trainer's weights, not the checkpoint's."""
        for request, result in zip(ASKED, results, strict=True):
            assert (tuple(t.sample_id for t in result.trajectories), result.dropped, result.lost) == (
                request.sample_ids,
                {},
                (),
            )
        for t in trajectories(results).values():
            assert t.weight_versions == (version,)
            log_probs_R, ids_MRK = self.reference.log_probs_and_routes(t)
            np.testing.assert_allclose(t.log_probs_R, log_probs_R, atol=1e-4)
            np.testing.assert_array_equal(t.routes.ids_MRK, ids_MRK)

    def server(self, engine: int) -> Any:
        return self.rollouts.engines[engine].rollout._process

    def scheduler(self, engine: int) -> psutil.Process:
        """The process that generates; another one speaks HTTP."""
        (found,) = [p for p in group_members(self.server(engine)) if "scheduler" in " ".join(p.cmdline())]
        return found

    @contextmanager
    def answered(self, engine: int, count: int, strike: Callable[[], object]) -> Iterator[Counter[str]]:
        """Strike once that many answers of an engine came; how often each path of it was asked in all.

        The next server of the engine has a client of its own, which this does not see.
        """
        client = self.rollouts.engines[engine].rollout._client
        assert client is not None
        post, paths = client.post, Counter[str]()

        async def counted(path: str, *arguments: Any) -> bytes:
            body = await post(path, *arguments)
            paths[path] += 1
            if paths[path] == count:
                strike()
            return body

        client.post = counted  # type: ignore[method-assign]
        yield paths


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    here = tmp_path_factory.mktemp("world")
    old = make_tiny_checkpoint(here / "old", seed=0, norm_noise=0.0)
    new = make_tiny_checkpoint(here / "new", seed=5, norm_noise=0.0)
    config = configuration(old, "float32", response_length=24, max_concurrent_requests=8, hang_timeout=HANG_TIMEOUT)
    with nothing_left():
        world = World(config, new, here)
        try:
            yield world
        finally:
            world.trainer.close()
            world.rollouts.close()


@pytest.mark.fault("a rollout server is killed while it generates")
def test_a_server_killed_under_its_requests_is_started_again(fault: Fault, world: World) -> None:
    struck = 0.0
    victims = group_members(world.server(0))
    port, key = (getattr(world.rollouts.weight_targets()[0], name) for name in ("port", "api_key"))

    def strike() -> None:
        nonlocal struck
        struck = time.monotonic()
        world.scheduler(0).kill()

    with world.answered(0, 10, strike) as paths:
        results = world.engines.generate(ASKED)
    seconds = time.monotonic() - struck
    world.assert_undisturbed(results, 1)
    kept = paths["/generate"]
    assert 10 <= kept < 32, "the fault came in between"
    (again,) = [line for line in world.said if line.startswith("samples asked for again")]
    assert again == f"samples asked for again: {32 - kept}", "what came before is kept"
    assert world.engines.step_done() == 1
    assert not any(p.is_running() and p.status() != psutil.STATUS_ZOMBIE for p in victims)
    target = world.rollouts.weight_targets()[0]
    assert target.port != port and target.api_key != key
    (line,) = [line for line in world.said if line.startswith("actor_infer-0 failed")]
    assert re.match(
        r"actor_infer-0 failed, and is started again \(1 of 3 times before a step is done\): engine 0 \(SGLang\) died",
        line,
    )
    fault.user_sees("actor_infer-0 failed, and is started again (1 of 3 times ...): engine 0 (SGLang) died: ...")
    fault.recovered(seconds)
    fault.lost("nothing; samples that had not come are sampled again, with their seeds, from the same weights")


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
        results = world.engines.generate(ASKED)
    seconds = time.monotonic() - struck
    world.assert_undisturbed(results, 1)
    assert world.engines.step_done() == 1
    assert not any(p.is_running() and p.status() != psutil.STATUS_ZOMBIE for p in victims)
    assert re.search(
        r"engine 1 \(SGLang\) gave no sign of life for 30 s \(strategy_config\.hang_timeout\)", world.said[-2]
    )
    assert HANG_TIMEOUT <= world.said_at - struck < 2 * HANG_TIMEOUT + 10
    fault.user_sees(
        "actor_infer-1 failed, and is started again (...): engine 1 (SGLang) gave no sign of life for 30 s ..."
    )
    fault.recovered(seconds)
    fault.lost("nothing; samples that had not come are sampled again, with their seeds, from the same weights")


@pytest.mark.long
@pytest.mark.fault("a rollout server answers garbage")
def test_an_engine_that_answers_garbage_is_started_again(fault: Fault, world: World) -> None:
    """A real server's answers, spoilt on the way: no real one spoils them on demand."""
    client = world.rollouts.engines[0].rollout._client
    assert client is not None
    post = client.post

    async def spoilt(path: str, *arguments: Any) -> bytes:
        return (await post(path, *arguments)).replace(b'"routed_experts":"', b'"routed_experts":"AAAA')

    client.post = spoilt  # type: ignore[method-assign]
    began = time.monotonic()
    results = world.engines.generate(ASKED)
    fault.recovered(time.monotonic() - began)
    world.assert_undisturbed(results, 1)
    assert world.engines.step_done() == 1
    seen = "engine 0 (SGLang) gave nothing usable: 32 samples of 8 prompts failed, with 3 retries each"
    assert seen in world.said[-2]
    fault.user_sees(f"actor_infer-0 failed, and is started again (...): {seen} ...; the last: routed_experts ...")
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
    world.engines.send_weights(2)
    fault.recovered(time.monotonic() - struck)
    assert world.trainer.updates[-1] == 2
    world.assert_undisturbed(world.engines.generate(ASKED), 2)
    assert not set(ports) & {target.port for target in world.rollouts.weight_targets()}, "half of the weights is no use"
    assert world.engines.step_done() == 2
    fault.user_sees("actor_infer-1 failed, and is started again (1 of 3 times ...): engine 1 (SGLang) died: ...")
    fault.lost("nothing; every engine that took part is started again and gets the weights from the first on")


@pytest.mark.long
def test_a_server_that_died_between_two_steps_is_found_by_the_update(world: World) -> None:
    survivor = world.rollouts.weight_targets()[0].port
    os.killpg(world.server(1).pid, signal.SIGKILL)
    world.rollouts.each(lambda engine, _: asyncio.wait_for(asyncio.shield(engine.rollout._process.death), 10), [1])
    world.engines.send_weights(3)
    assert world.engines.step_done() == 1
    assert world.rollouts.weight_targets()[0].port == survivor, "it left the old group and joined the new one"
    world.assert_undisturbed(world.engines.generate(ASKED), 3)


@pytest.mark.long
def test_a_server_started_again_answers_nothing_before_its_weights_are_back(world: World) -> None:
    """The last test of these engines."""
    rollout = world.rollouts.engines[0].rollout
    world.rollouts.each(lambda engine, _: engine.rollout.restart(), [0])
    with pytest.raises(EngineError, match="has the checkpoint's weights: an update comes first"):
        world.rollouts.each(lambda engine, _: engine.rollout.generate(requests(1, 1)), [0])
    assert rollout._weight_version == 0


def servers(run: Run) -> list[psutil.Process]:
    """The engine's processes."""
    return [p for p in run.descendants() if "sglang" in p.name().lower() or "launcher.py" in " ".join(p.cmdline())]


def wait_for_requests(run: Run) -> None:
    """Until the engine has begun more of them than when this was called."""
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
    assert re.search(r"actor_infer-0 failed, and is started again \(1 of 1 times .*engine 0 \(SGLang\) died", said)
    assert "LOST" not in said
    fault.user_sees("actor_infer-0 failed, and is started again (1 of 1 times ...); rollout/engine_restarts is 1")
    fault.lost("nothing; samples that had not come are sampled again")


def generating(where: Path) -> Run:
    """A run whose server generates, after its first step."""
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
    """Directories of servers that the run's newest worker launched."""
    log = (run.path / "logs" / "actor_infer-0.log").read_text()
    worker = re.findall(r"is process (\d+)", log)[-1]
    return list(Path(tempfile.gettempdir()).glob(f"roll_r3-server-{worker}-*"))


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
        # The next server that is launched on this machine removes what its directory names, and the directory.
        named = [path for folder in folders(run) for path in (folder / "shared_memory").read_text().splitlines()]
        left = set(run.started.left(RAYS_LAST_WORD)) - {f"shared memory {path}" for path in named}
        assert not left, "left behind:\n" + "\n".join(left)
        _remove_what_is_orphaned()
        assert folders(run) == [] and not any(os.path.exists(path) for path in named)
    finally:
        run.end()
    fault.user_sees(
        "nothing; the server and its children end by themselves, the next one on that machine tidies up after them"
    )
    fault.lost("nothing; steps since the last checkpoint are done again")
