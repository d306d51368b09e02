"""The roles as the pipeline sees them: a group of actors behind plain methods."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import ray

from roll_r3.batch.batch import Batch, FloatN
from roll_r3.batch.grouping import IntArray, assign_to_ranks
from roll_r3.cluster.calls import Say, Waiting
from roll_r3.cluster.daemons import vital
from roll_r3.cluster.placement import Placement
from roll_r3.cluster.signs import SIGNS
from roll_r3.cluster.workers import WRITING, ModelWorker, RolloutWorker
from roll_r3.config.derived import engine_devices
from roll_r3.config.pipeline import RLVRConfig
from roll_r3.config.rules.devices import (
    ENGINE_ON_ONE_NODE,
    ENGINES_BEYOND_LOOPBACK,
    engines_out_of_reach,
    scattered_engines,
)
from roll_r3.replay.counts import ReplayCounts
from roll_r3.saving.manifest import FileSum
from roll_r3.strategies.base import GenerateRequest, GenerateResult, LogProbResult, Role, TrainResult

logger = logging.getLogger(__name__)

STOP_TIMEOUT = 30.0
"""Seconds that workers get to leave in order at the end of a run that went well."""
FAILED_STOP_TIMEOUT = 5.0
"""The same after a failure: the ranks left may wait for a dead one, and only the engines have something to end."""

Unbroken = Callable[[], AbstractContextManager[None]]
Calls = dict[ray.ObjectRef[Any], tuple[str, Path]]
"""Calls under way: reference -> (worker's name, its log file)."""


@dataclass(frozen=True)
class _Member:
    name: str
    handle: Any
    log: Path


class _Group:
    """Actors of one role."""

    def __init__(
        self, members: Sequence[_Member], unbroken: Unbroken = nullcontext, waiting: Waiting | None = None
    ) -> None:
        """
        Args:
            unbroken: keeps signals away while a call goes out to one member after the other: ranks that were called
                would wait for ever, in what they do together, for those that were not.
            waiting: waits for the members, and has them give signs of life.
        """
        self._members = tuple(members)
        self._unbroken = unbroken
        self._waiting = waiting or Waiting()
        for member in self._members:
            self._waiting.add(member.name, member.handle, member.log)

    def _call_each(self, method: str, arguments: Sequence[tuple[Any, ...]]) -> list[Any]:
        """Call one method on every member, each with its own arguments; results in member order."""
        calls = self._begin_each(method, arguments)
        results = self._waiting.wait_for(calls, method)
        return [results[ref] for ref in calls]

    def _begin_each(self, method: str, arguments: Sequence[tuple[Any, ...]]) -> Calls:
        """The same, without waiting."""
        with self._unbroken():
            return {
                getattr(m.handle, method).remote(*a): (m.name, m.log)
                for m, a in zip(self._members, arguments, strict=True)
            }

    def _call(self, method: str, *arguments: Any) -> list[Any]:
        """Call one method on every member with the same arguments."""
        return self._call_each(method, [arguments] * len(self._members))

    def kill(self) -> None:
        """End every member's process."""
        for member in self._members:
            ray.kill(member.handle, no_restart=True)


class RolloutGroup(_Group):
    """`actor_infer`: its engines."""

    @classmethod
    def launch(
        cls, config: RLVRConfig, placement: Placement, log_dir: Path, waiting: Waiting | None = None
    ) -> RolloutGroup:
        """One actor per engine, on the node of the engine's devices. Nothing is started yet.

        Raises:
            ConfigError: an engine's devices lie on different nodes, or a node is out of reach of the trainer.
        """
        ENGINE_ON_ONE_NODE.require(config, scattered_engines(config, placement.node_of))
        ENGINES_BEYOND_LOOPBACK.require(config, engines_out_of_reach(config, placement.node_of))
        members = []
        for engine, numbers in enumerate(engine_devices(config)):
            devices = [placement.devices[d] for d in numbers]
            name, log = f"actor_infer-{engine}", log_dir / f"actor_infer-{engine}.log"
            gpu_ids = tuple(d.gpu_id for d in devices if d.gpu_id is not None)
            actor = ray.remote(concurrency_groups={SIGNS: 1})(RolloutWorker).options(  # type: ignore[call-overload]
                name=name, **placement.options(devices[0].index)
            )
            members.append(_Member(name, actor.remote(config, engine, placement.kind, gpu_ids, log), log))
        return cls(members, waiting=waiting)

    def begin_start(self) -> Calls:
        return self._begin_each("start", [()] * len(self._members))

    def generate(self, requests: Sequence[GenerateRequest]) -> list[GenerateResult]:
        """Spread prompts over the engines, as even as they divide; results in the order of `requests`."""
        size = len(self._members)
        shares = [list(requests[i::size]) for i in range(size)]
        answers = self._call_each("generate", [(share,) for share in shares])
        return [answers[i % size][i // size] for i in range(len(requests))]

    def down(self, *, ask: bool) -> dict[str, str]:
        """Worker's name -> why its engine is of no more use until it is started again, of those that are not.

        Args:
            ask: have each engine give a sign of life.
        """
        reasons = self._call("why_down", ask)
        return {member.name: why for member, why in zip(self._members, reasons, strict=True) if why}

    def restart(self, names: Collection[str]) -> dict[str, str]:
        """Start engines anew, side by side; worker's name -> why its engine did not start, of those that did not."""
        calls = {m.handle.restart.remote(): (m.name, m.log) for m in self._members if m.name in names}
        results = self._waiting.wait_for(calls, "restart")
        return {name: results[ref] for ref, (name, _) in calls.items() if results[ref]}

    @property
    def names(self) -> tuple[str, ...]:
        """Of the workers, one to an engine."""
        return tuple(member.name for member in self._members)

    def begin_close(self, *, at_once: bool) -> Calls:
        """End every engine: in order, or at once, since workers do not get the time for that after a failure."""
        return self._begin_each("close", [(at_once,)] * len(self._members))

    def weight_targets(self) -> list[Any]:
        return self._call("weight_target")

    def weights_updated(self, version: int) -> None:
        self._call("weights_updated", version)


@dataclass(frozen=True)
class BatchLogProbs:
    """Of a whole batch, in its order."""

    log_probs_N: FloatN
    entropy_N: FloatN | None
    replay: ReplayCounts | None
    seconds_in_routes: float
    """Of the slowest rank."""


@dataclass(frozen=True)
class BatchUpdate:
    metrics: dict[str, float]
    replay: ReplayCounts | None
    seconds_in_routes: float
    """Of the slowest rank."""
    skipped: tuple[str, ...] = ()
    """Of each optimizer step that was not made, why."""
    old: BatchLogProbs | None = None
    """Log-probabilities of the policy before the update, where the batch did not bring them. `seconds_in_routes` has
    their time already."""


class ModelGroup(_Group):
    """`actor_train` or `reference`: its ranks."""

    def __init__(
        self, members: Sequence[_Member], unbroken: Unbroken = nullcontext, waiting: Waiting | None = None
    ) -> None:
        super().__init__(members, unbroken, waiting)
        self._starting: Calls = {}
        self._places: list[tuple[int, int, bool]] = []
        """Of each rank: data-parallel rank, data-parallel size, whether it returns results."""

    @classmethod
    def launch(
        cls,
        config: RLVRConfig,
        role: Role,
        placement: Placement,
        threads: int,
        log_dir: Path,
        unbroken: Unbroken = nullcontext,
        waiting: Waiting | None = None,
    ) -> ModelGroup:
        """One actor per device of the role, in rank order. Nothing is loaded yet."""
        mapping = getattr(config, role).device_mapping
        members = []
        for rank, device in enumerate(mapping):
            name, log = f"{role}-{rank}", log_dir / f"{role}-{rank}.log"
            env = {"OMP_NUM_THREADS": str(threads)}
            actor = ray.remote(concurrency_groups={WRITING: 1, SIGNS: 1})(ModelWorker).options(  # type: ignore[call-overload]
                name=name, runtime_env={"env_vars": env}, **placement.options(device)
            )
            handle = actor.remote(config, role, rank, len(mapping), placement.kind, threads, log)
            members.append(_Member(name, handle, log))
        return cls(members, unbroken, waiting)

    def begin_start(self) -> Calls:
        """Have the first rank say where the ranks meet, and all of them load the model."""
        master = self._members[0].handle.host_store.remote()
        self._starting = self._begin_each("initialize", [(master,)] * len(self._members))
        return self._starting

    def begin_close(self) -> Calls:
        """Ask every rank to leave in order."""
        return self._begin_each("close", [()] * len(self._members))

    def started(self, results: Mapping[ray.ObjectRef[Any], Any]) -> None:
        """Take what the calls of `begin_start` returned."""
        self._places = [results[ref] for ref in self._starting]

    @property
    def data_parallel_size(self) -> int:
        return self._places[0][1]

    def compute_log_probs(self, batch: Batch) -> BatchLogProbs:
        """Log-probabilities of every input's label, in the batch's order."""
        shards = assign_to_ranks(batch.lengths_n, self.data_parallel_size)
        results = self._call_on_shards("compute_log_probs", batch, shards)
        return self._joined(batch, shards, results, max(r.seconds_in_routes for r in results))

    def _joined(
        self, batch: Batch, shards: Sequence[IntArray], results: Sequence[LogProbResult | TrainResult], seconds: float
    ) -> BatchLogProbs:
        """Join what the ranks found for their shards, in the batch's order."""
        log_probs, entropy = np.zeros(len(batch.labels_N), np.float32), None
        offsets = batch.offsets
        for (dp_rank, _, returns), result in zip(self._places, results, strict=True):
            if not returns:
                continue
            index = np.concatenate([np.arange(offsets[i], offsets[i + 1]) for i in shards[dp_rank]])
            log_probs[index] = result.log_probs_N
            if result.entropy_N is not None:
                entropy = np.zeros_like(log_probs) if entropy is None else entropy
                entropy[index] = result.entropy_N
        return BatchLogProbs(log_probs, entropy, results[0].replay, seconds)

    def train_step(self, batch: Batch, step: int) -> BatchUpdate:
        shards = assign_to_ranks(batch.lengths_n, self.data_parallel_size)
        results = self._call_on_shards("train_step", batch, shards, step)
        first, seconds = results[0], max(r.seconds_in_routes for r in results)
        old = self._joined(batch, shards, results, 0.0) if batch.old_log_probs_N is None else None
        return BatchUpdate(first.metrics, first.replay, seconds, first.skipped, old)

    def connect_engines(self, targets: Sequence[Any]) -> None:
        """The first rank will send the weights, and leaves the engines that it sent them to before."""
        first = self._members[0]
        call = first.handle.connect_engines.remote(targets)
        self._waiting.wait_for({call: (first.name, first.log)}, "connect_engines")

    def update_weights(self, version: int) -> str:
        """Send the weights to the connected engines; why an engine did not take them, or empty."""
        return next((failure for failure in self._call("update_weights", version) if failure), "")

    def take_snapshot(self) -> None:
        """Every rank copies its part of the model and its optimizer into its host's memory."""
        self._call("take_snapshot")

    def write_snapshot(self, path: Path) -> dict[str, FileSum]:
        """Every rank writes its part of the snapshot, whatever else it is asked for meanwhile from other threads; the
        checksums of all files, by name."""
        return {name: found for sums in self._call("write_snapshot", path) for name, found in sums.items()}

    def load_checkpoint(self, path: Path) -> None:
        """Every rank takes its part of what `write_snapshot` wrote."""
        self._call("load_checkpoint", path)

    def save_hf(self, path: Path) -> dict[str, int]:
        """Write the weights, config and tokenizer as a Hugging Face checkpoint; bytes of each file, by name."""
        sizes: dict[str, int] = self._call("save_hf", path)[0]
        return sizes

    def _call_on_shards(self, method: str, batch: Batch, shards: Sequence[IntArray], *rest: Any) -> list[Any]:
        """Every rank gets its data-parallel shard, stored once per shard."""
        refs = [ray.put(batch.select(shard)) for shard in shards]
        return self._call_each(method, [(refs[dp_rank], *rest) for dp_rank, _, _ in self._places])


class Roles:
    """All roles of a run: launched together, started side by side, ended together."""

    def __init__(
        self,
        config: RLVRConfig,
        placement: Placement,
        log_dir: Path,
        unbroken: Unbroken = nullcontext,
        say: Say | None = None,
    ) -> None:
        """Launch every role's actors; nothing is started yet.

        Args:
            unbroken: see `_Group`.
            say: shows the person who started the run who is waited for.
        """
        self._waiting = waiting = Waiting(config.worker_timeouts, say)
        ranks = len(config.actor_train.device_mapping)
        threads = max(1, (os.cpu_count() or 1) // ranks) if placement.kind == "cpu" else 1
        self.rollout = RolloutGroup.launch(config, placement, log_dir, waiting)
        self.trainer = ModelGroup.launch(config, "actor_train", placement, threads, log_dir, unbroken, waiting)
        self.reference: ModelGroup | None = None
        if config.reference is not None:
            self.reference = ModelGroup.launch(config, "reference", placement, threads, log_dir, unbroken, waiting)

    @property
    def _models(self) -> list[ModelGroup]:
        return [self.trainer, *([self.reference] if self.reference else [])]

    def start(self) -> None:
        """Start engines and load models, all at once. Raises WorkerError with the first that fails."""
        calls = self.rollout.begin_start()
        for model in self._models:
            calls |= model.begin_start()
        results = self._waiting.wait_for(calls, "start")
        for model in self._models:
            model.started(results)
        self._waiting.meet()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Let every process leave, then end it, or end it at once on a signal. Raises nothing of its own: an error
        may be on its way already. Without Ray's own processes nobody answers, and the workers are killed already."""
        if any(daemon.state == "gone" for daemon in vital()):
            return
        try:
            calls = self.rollout.begin_close(at_once=kind is not None)
            for model in self._models:
                calls |= model.begin_close()
            timeout = STOP_TIMEOUT if kind is None else FAILED_STOP_TIMEOUT
            _, late = ray.wait(list(calls), num_returns=len(calls), timeout=timeout)
            if late and kind is None:
                names = ", ".join(calls[ref][0] for ref in late)
                logger.warning("%s did not leave within %.0f s; ending their processes", names, timeout)
        finally:
            for group in (self.rollout, *self._models):
                group.kill()
