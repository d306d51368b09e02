"""Engines driven as the pipeline drives them, without Ray and Megatron, to choose a fault's moment."""

from __future__ import annotations

import asyncio
import threading
import time
from collections import Counter
from collections.abc import Callable, Collection, Coroutine, Hashable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from faults import Fault
from rollout_cases import Reference, Rollout, group_members, requests, trajectories
from safetensors.torch import load_file
from whole_rollout import sample_all

from roll_r3.cluster.engine_pool import EnginePool
from roll_r3.config.pipeline import RLVRConfig
from roll_r3.errors import EngineError
from roll_r3.strategies.base import GenerateRequest, GenerateResult
from roll_r3.weights.channel import ServerWeightChannel

ASKED = requests(16, 4)


@dataclass(frozen=True)
class Kind:
    """Engine under test."""

    engine: Callable[..., Rollout[Any]]
    channel: type[ServerWeightChannel]
    generates: str
    """Text in the title or command of the generating process; another process speaks HTTP."""


class Rollouts:
    """Two engines, each in a thread with a loop of its own, behind the methods that the pool calls."""

    def __init__(self, kind: Kind, config: RLVRConfig, log_dir: Path) -> None:
        self.engines = [kind.engine(config, log_dir / f"server{i}.log", engine_index=i) for i in (0, 1)]
        self.threads = []
        self._under_way: set[Future[Any]] = set()
        for engine in self.engines:
            # one thread for the engine's whole life: its server dies with the thread that launched it
            thread = threading.Thread(target=engine.loop.run_forever, daemon=True)
            thread.start()
            self.threads.append(thread)

    names = ("actor_infer-0", "actor_infer-1")

    def each(self, call: Callable[[Rollout[Any], int], Any], which: Collection[int] = (0, 1)) -> list[Any]:
        futures = [asyncio.run_coroutine_threadsafe(call(self.engines[i], i), self.engines[i].loop) for i in which]
        return [future.result(600) for future in futures]

    def _begin(self, name: str, work: Coroutine[Any, Any, Any]) -> Hashable:
        call: Future[Any] = asyncio.run_coroutine_threadsafe(work, self.engines[self.names.index(name)].loop)
        self._under_way.add(call)
        return call

    def begin_generate(self, name: str, asked: Sequence[GenerateRequest]) -> list[Hashable]:
        rollout = self.engines[self.names.index(name)].rollout
        return [self._begin(name, rollout.generate(request)) for request in asked]

    def abort(self, calls: Sequence[Hashable]) -> None:
        raise NotImplementedError("no test of faults aborts")

    def begin_restart(self, name: str) -> Hashable:
        async def restart() -> str:
            await self.engines[self.names.index(name)].rollout.restart()
            return ""

        return self._begin(name, restart())

    def ended(self, timeout: float | None) -> dict[Hashable, Any]:
        done, self._under_way = wait(self._under_way, timeout or 600.0, FIRST_COMPLETED)
        return {call: call.result() for call in done}

    def down(self, *, ask: bool) -> dict[str, str]:
        reasons = self.each(lambda engine, _: engine.rollout.why_down(ask=ask))
        return {name: why for name, why in zip(self.names, reasons, strict=True) if why}

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
    """Sender of a checkpoint's weights, as in `cluster.workers.ModelWorker`; `half_way` is called in the middle."""

    def __init__(self, kind: Kind, weights: dict[str, torch.Tensor]) -> None:
        self._kind = kind
        self.weights = weights
        self.channel: ServerWeightChannel | None = None
        self.half_way: Callable[[], None] = lambda: None
        self.updates: list[int] = []

    def connect_engines(self, targets: Sequence[Any]) -> None:
        self.close()
        self.channel = self._kind.channel(targets, device="cpu", timeout_s=60.0)

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
    """Engines with weights other than their initial ones."""

    def __init__(self, kind: Kind, config: RLVRConfig, trained: Path, log_dir: Path) -> None:
        self.kind = kind
        self.said: list[str] = []
        self.said_at = 0.0
        self.reference = Reference(trained)
        self.rollouts = Rollouts(kind, config, log_dir)
        self.trainer = Trainer(kind, load_file(trained / "model.safetensors"))
        self.rollouts.each(lambda engine, _: engine.rollout.start())
        self.pool = EnginePool(config, self.rollouts, self.trainer, self._say)
        self.pool.update_weights(1)

    def sample(self) -> list[GenerateResult]:
        return sample_all(self.pool, ASKED)

    def restarted(self, version: int) -> int:
        """Wait until every engine is up and has weights of this version; return the number of restarts."""
        self.pool.update_weights(version)
        return self.pool.step_done()

    def _say(self, text: str) -> None:
        self.said.append(text)
        if "failed" in text:
            self.said_at = time.monotonic()

    def assert_undisturbed(self, results: Sequence[GenerateResult], version: int) -> None:
        """Check that every sample came once, in order, sampled from the trainer's weights, not the checkpoint's."""
        for request, result in zip(ASKED, results, strict=True):
            assert (tuple(t.sample_id for t in result.trajectories), result.dropped, result.lost) == (
                request.sample_ids,
                {},
                (),
            )
        for t in trajectories(results).values():
            assert t.weight_versions == (version,)
            log_probs_R, ids_MRK = self.reference.log_probs_and_routes(t)
            np.testing.assert_allclose(t.log_probs, log_probs_R, atol=1e-4)
            np.testing.assert_array_equal(t.routes.ids_MRK, ids_MRK)

    def server(self, engine: int) -> Any:
        return self.rollouts.engines[engine].rollout._process

    def scheduler(self, engine: int) -> psutil.Process:
        """Return the generating process."""
        members = group_members(self.server(engine))
        (found,) = [p for p in members if self.kind.generates in f"{p.name()} {' '.join(p.cmdline())}"]
        return found

    @contextmanager
    def answered(self, engine: int, count: int, strike: Callable[[], object]) -> Iterator[Counter[str]]:
        """Call `strike` after `count` answers of an engine; yield the number of answers by path.

        The next server of the engine has its own client and is not counted.
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

    def close(self) -> None:
        self.trainer.close()
        self.rollouts.close()


def killed_under_its_requests(fault: Fault, world: World) -> None:
    """Kill the generating process of the first engine after ten of its answers."""
    struck = 0.0
    victims = group_members(world.server(0))
    port, key = (getattr(world.rollouts.weight_targets()[0], name) for name in ("port", "api_key"))
    rollout = world.rollouts.engines[0].rollout

    def strike() -> None:
        nonlocal struck
        struck = time.monotonic()
        world.scheduler(0).kill()

    with world.answered(0, 10, strike) as paths:
        results = world.sample()
    seconds = time.monotonic() - struck
    world.assert_undisturbed(results, 1)
    kept = paths[rollout._parts.codec.path]
    assert 10 <= kept < 32, "the fault came in between"
    (again,) = [line for line in world.said if line.startswith("samples requested again")]
    lost = int(again.rpartition(" ")[2])
    assert 0 < lost <= 32 - kept, "what came before is kept"
    assert world.restarted(1) == 1
    assert not any(p.is_running() and p.status() != psutil.STATUS_ZOMBIE for p in victims)
    target = world.rollouts.weight_targets()[0]
    assert target.port != port and target.api_key != key
    (line,) = [line for line in world.said if line.startswith("actor_infer-0 failed")]
    died = f"engine 0 ({rollout._parts.program.engine}) died"
    assert line.startswith(f"actor_infer-0 failed and is restarted (1 of 3 times before a step is done): {died}")
    fault.user_sees(f"actor_infer-0 failed and is restarted (1 of 3 times ...): {died}: ...")
    fault.recovered(seconds)
    fault.lost("nothing; missing samples are sampled again, with their seeds and weights")
