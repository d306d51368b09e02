"""Content of the actors, one strategy each. Rollouts store their routes here; ranks get a reader of them."""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TypeVar

import ray
import torch

from roll_r3.batch.batch import Batch
from roll_r3.batch.route_pieces import Parcel, RouteRequest
from roll_r3.cluster.life_signs import SIGNS, Identity, identity
from roll_r3.cluster.logs import log_to_file
from roll_r3.cluster.transport import cut, read_routes, store_routes
from roll_r3.config.derived import checkpoint_of
from roll_r3.config.engine_role import engine_role
from roll_r3.config.model_role import Role, model_role
from roll_r3.config.pipeline import RLVRConfig
from roll_r3.errors import CheckpointError, ConfigError, EngineError
from roll_r3.models.checkpoint_files import resolve_checkpoint
from roll_r3.models.facts import read_facts
from roll_r3.saving.manifest import EVERY_NODE, FileSum, file_sum, files_below
from roll_r3.strategies.base import (
    EnginePlace,
    GenerateRequest,
    GenerateResult,
    InferStrategy,
    LogProbResult,
    ModelClass,
    ProcessInfo,
    RolloutStrategy,
    Snapshot,
    TrainResult,
    TrainStrategy,
    WeightChannel,
    WeightTarget,
)
from roll_r3.strategies.registry import STRATEGIES
from roll_r3.trainers import world

logger = logging.getLogger(__name__)

Strategy = TypeVar("Strategy", bound=InferStrategy)
MIB = 1 << 20
WRITING = "writing"
"""Concurrency group of calls answered in a thread of their own, one at a time."""


class RolloutWorker:
    """One rollout engine (an asyncio actor)."""

    def __init__(
        self, config: RLVRConfig, engine_index: int, device: str, gpu_ids: tuple[int, ...], log_path: Path
    ) -> None:
        log_to_file(log_path)
        os.environ.update(config.system_envs)
        logger.info("engine %d is process %d on %s", engine_index, os.getpid(), ray.util.get_node_ip_address())
        entry = STRATEGIES[config.actor_infer.strategy_args.strategy_name]
        self._model_path = checkpoint_of(config, "actor_infer")
        self._num_experts = 0
        self._generating: dict[int, asyncio.Task[GenerateResult]] = {}
        """Number of a call -> its request under way."""
        server_log = log_path.with_name(f"{log_path.stem}-server.log")
        place = EnginePlace(engine_index, device, gpu_ids, server_log, ray.util.get_node_ip_address())
        self._strategy: RolloutStrategy = entry.load_rollout()(engine_role(config), place)

    @ray.method(concurrency_group=SIGNS)
    async def alive(self) -> Identity:
        """A sign of life, in a thread of its own."""
        return identity()

    async def start(self) -> None:
        self._num_experts = read_facts(resolve_checkpoint(self._model_path)).num_experts
        await self._strategy.start()

    async def begin_generate(self, requests: Mapping[int, GenerateRequest]) -> None:
        """Give all requests to the engine at once, for it to batch them; `generated` takes each result.

        Args:
            requests: number of a call -> its request.
        """
        for number, request in requests.items():
            self._generating[number] = asyncio.create_task(self._generate(request))

    async def generated(self, number: int, begun: None) -> GenerateResult:
        """Return the result of a request, with handles in place of routes.

        Args:
            begun: result of `begin_generate`. Ray keeps no order among the calls of an asyncio actor, but runs this one
                after the call that it depends on, and has it fail if that one failed.
        """
        task = self._generating[number]
        try:
            await asyncio.wait([task])
            return GenerateResult(()) if task.cancelled() else task.result()
        finally:
            del self._generating[number]

    async def abort(self, number: int, begun: None) -> None:
        """End a request, if it is still under way; its result is empty then.

        Args:
            begun: as in `generated`.
        """
        if number in self._generating:
            self._generating[number].cancel()

    async def _generate(self, request: GenerateRequest) -> GenerateResult:
        result = await self._strategy.generate(request)
        stored = await asyncio.to_thread(store_routes, result.trajectories, self._num_experts)
        return replace(result, trajectories=stored)

    async def cut_routes(self, requests: Sequence[RouteRequest]) -> Parcel:
        """Cut routes of samples for a rank on another node, from those stored by `begin_generate`."""
        return await asyncio.to_thread(cut, requests)

    async def weight_target(self) -> WeightTarget:
        return self._strategy.weight_target()

    async def why_down(self, ask: bool) -> str:
        """As `RolloutStrategy.why_down`."""
        return await self._strategy.why_down(ask=ask)

    async def restart(self) -> str:
        """Restart the engine; return why it did not start, or an empty text.

        It started before with these settings and this model. If they cannot be read now, a disk is at fault.
        """
        try:
            await self._strategy.restart()
        except (ConfigError, EngineError, OSError) as error:
            why = str(error) or repr(error)
            logger.warning("%s", why)
            return why
        return ""

    async def weights_updated(self, version: int) -> None:
        await self._strategy.on_weights_updated(version)

    async def close(self, at_once: bool) -> None:
        """As `RolloutStrategy.stop`."""
        await self._strategy.stop(at_once=at_once)


class ModelWorker:
    """One rank of actor_train or reference."""

    def __init__(
        self, config: RLVRConfig, role: Role, rank: int, world_size: int, device: str, threads: int, log_path: Path
    ) -> None:
        log_to_file(log_path)
        os.environ.update(config.system_envs)
        logger.info("%s rank %d is process %d on %s", role, rank, os.getpid(), ray.util.get_node_ip_address())
        torch.set_num_threads(threads)
        self._config, self._role = config, role
        # Ray shows a process the one GPU of its bundle, so the local rank is 0 everywhere
        self._process = ProcessInfo(rank=rank, world_size=world_size, local_rank=0, device=device)
        self._channel: WeightChannel | None = None
        self._bucket_bytes = 0
        self._snapshot: Snapshot | None = None
        self._strategy: InferStrategy
        self._trainer: TrainStrategy | None = None
        """The same strategy, if it learns."""

    @ray.method(concurrency_group=SIGNS)
    def alive(self) -> Identity:
        """A sign of life, in a thread of its own."""
        return identity()

    def host_store(self) -> tuple[str, int]:
        """Host the store of the role's rendezvous, on rank 0 at this node's address; return its address and port.

        It listens from now on, so nobody else can take the port while the ranks are still importing.
        """
        ip = ray.util.get_node_ip_address()
        self._store = world.host_store(ip)
        return ip, self._store.port

    def initialize(self, master: tuple[str, int]) -> tuple[int, int, bool]:
        """Load the model. Returns (data-parallel rank, data-parallel size, returns results)."""
        worker = getattr(self._config, self._role)
        entry = STRATEGIES[worker.strategy_args.strategy_name]
        process = replace(self._process, master_addr=master[0], master_port=master[1])
        if entry.kind == "train":
            self._trainer = self._made(entry.load_trainer(), process)
            self._strategy = self._trainer
        else:
            self._strategy = self._made(entry.load_model(), process)
        self._strategy.initialize()
        s = self._strategy
        return s.data_parallel_rank, s.data_parallel_size, s.returns_results

    def _made(self, strategy: ModelClass[Strategy], process: ProcessInfo) -> Strategy:
        checkpoint = resolve_checkpoint(checkpoint_of(self._config, self._role))
        role = model_role(self._config, self._role, checkpoint=str(checkpoint))
        return strategy(role, process, read_routes=read_routes)

    @property
    def _learning(self) -> TrainStrategy:
        assert self._trainer is not None, f"{self._role} does not learn"
        return self._trainer

    def compute_log_probs(self, shard: Batch) -> LogProbResult:
        return self._strategy.compute_log_probs(shard)

    def train_step(self, shard: Batch, step: int) -> TrainResult:
        return self._learning.train_step(shard, step)

    def connect_engines(self, targets: Sequence[WeightTarget]) -> None:
        """On rank 0: get ready to send weights to these engines, and to no others any more."""
        if self._channel is not None:
            self._channel.close()
        strategy = self._config.actor_infer.strategy_args
        channel = STRATEGIES[strategy.strategy_name].load_channel()
        self._channel = channel(targets, device=self._process.device)
        self._bucket_bytes = int(strategy.strategy_config.weight_bucket_mb * MIB)

    def update_weights(self, version: int) -> str:
        """Send this policy's weights to every connected engine; collective over all ranks.

        Returns:
            On the connected rank, why an engine did not take them; empty on success. After a failure the engines'
            weights are of no version.
        """
        weights = self._strategy.export_weights()
        failure = ""
        if self._channel is not None:
            try:
                self._send(self._channel, weights, version)
            except EngineError as error:
                logger.warning("weights %d were not sent: %s", version, error)
                failure = str(error)
        for _ in weights:
            pass  # gathering a tensor needs every rank, to the last one
        return failure

    def _send(self, channel: WeightChannel, weights: Iterator[tuple[str, torch.Tensor]], version: int) -> None:
        start = time.perf_counter()
        sending = _seconds(lambda: channel.begin(version))
        tensors = 0
        for bucket in channel.buckets(weights, self._bucket_bytes):
            sending += _seconds(partial(channel.send, bucket))
            tensors += len(bucket)
            del bucket  # while the next one is gathered its memory is free
        sending += _seconds(channel.end)
        gathering = time.perf_counter() - start - sending
        logger.info("weights %d: %d tensors, gathered in %.2f s, sent in %.2f s", version, tensors, gathering, sending)

    def take_snapshot(self) -> None:
        """As `TrainStrategy.snapshot`; `write_snapshot` writes it."""
        self._snapshot = self._learning.snapshot()

    @ray.method(concurrency_group=WRITING)
    def write_snapshot(self, path: Path) -> dict[str, FileSum]:
        """Write the snapshot as `Snapshot.write`, beside other calls, and release it.

        Returns:
            Checksums of this rank's share of the files, by name.

        Raises:
            RollError: as `Snapshot.write`.
            CheckpointError: a written file cannot be read, or the disk does not keep it.
        """
        snapshot, self._snapshot = self._snapshot, None
        assert snapshot is not None, "there is one to write"
        snapshot.write(path)
        try:
            share = files_below(path)[self._process.rank :: self._process.world_size]
            return {name: file_sum(path / name) for name in share}
        except OSError as error:
            hint = f" ({EVERY_NODE})" if isinstance(error, FileNotFoundError) else ""
            raise CheckpointError(f"{path} is not kept: {type(error).__name__}: {error}{hint}") from error

    def load_checkpoint(self, path: Path) -> None:
        """As `TrainStrategy.load_checkpoint`."""
        self._learning.load_checkpoint(path)

    def save_hf(self, path: Path) -> dict[str, int]:
        """As `TrainStrategy.save_hf`."""
        return self._strategy.save_hf(path)

    def close(self) -> None:
        if self._channel is not None:
            self._channel.close()
        self._strategy.close()


def _seconds(action: Callable[[], None]) -> float:
    """Return the duration of an action."""
    start = time.perf_counter()
    action()
    return time.perf_counter() - start
