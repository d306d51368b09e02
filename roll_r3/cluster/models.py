"""Roles that run a model in training ranks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import ray

from roll_r3.batch.batch import Batch, FloatN
from roll_r3.batch.grouping import IntArray, assign_to_ranks
from roll_r3.cluster.actors import WRITING, ModelWorker
from roll_r3.cluster.calls import Waiting
from roll_r3.cluster.life_signs import SIGNS
from roll_r3.cluster.placement import Placement
from roll_r3.cluster.variables import runtime_env
from roll_r3.cluster.worker_group import Calls, Member, Unbroken, WorkerGroup
from roll_r3.config.model_role import Role
from roll_r3.config.pipeline import RLVRConfig
from roll_r3.replay.counts import ReplayCounts
from roll_r3.replay.expert_load import ExpertLoad
from roll_r3.saving.manifest import FileSum
from roll_r3.strategies.base import LogProbResult, TrainResult


@dataclass(frozen=True)
class BatchLogProbs:
    """Log-probabilities of a whole batch, in its order."""

    log_probs_N: FloatN
    entropy_N: FloatN | None
    replay: ReplayCounts | None
    seconds_in_routes: float
    """Seconds of the slowest rank."""
    load: ExpertLoad | None = None


@dataclass(frozen=True)
class BatchUpdate:
    """Results of a training step."""

    metrics: dict[str, float]
    replay: ReplayCounts | None
    seconds_in_routes: float
    """Seconds of the slowest rank."""
    skipped: tuple[str, ...] = ()
    """Reason for each skipped optimizer step."""
    old: BatchLogProbs | None = None
    """Log-probabilities of the policy before the update, if the batch brought none. `seconds_in_routes` includes their
    time.
    """
    load: ExpertLoad | None = None


class ModelGroup(WorkerGroup):
    """`actor_train` or `reference`: its ranks."""

    def __init__(
        self, members: Sequence[Member], unbroken: Unbroken = nullcontext, waiting: Waiting | None = None
    ) -> None:
        super().__init__(members, unbroken, waiting)
        self._starting: Calls = {}
        self._places: list[tuple[int, int, bool]] = []
        """Data-parallel rank, data-parallel size, and True if it returns results, for each rank."""

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
            env = runtime_env(config.system_envs, {"OMP_NUM_THREADS": str(threads)})
            actor = ray.remote(concurrency_groups={WRITING: 1, SIGNS: 1})(ModelWorker).options(  # type: ignore[call-overload]
                name=name, runtime_env=env, **placement.options(device)
            )
            handle = actor.remote(config, role, rank, len(mapping), placement.kind, threads, log)
            members.append(Member(name, handle, log))
        return cls(members, unbroken, waiting)

    def begin_start(self) -> Calls:
        """Set up the ranks' meeting point on the first rank, and have all of them load the model."""
        master = self._members[0].handle.host_store.remote()
        self._starting = self._begin_each("initialize", [(master,)] * len(self._members))
        return self._starting

    def begin_close(self) -> Calls:
        """Ask every rank to leave in order."""
        return self._begin_each("close", [()] * len(self._members))

    def started(self, results: Mapping[ray.ObjectRef[Any], Any]) -> None:
        """Take the results of the calls of `begin_start`."""
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
        """Join the results of the ranks' shards, in the batch's order."""
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
        return BatchLogProbs(log_probs, entropy, results[0].replay, seconds, results[0].load)

    def train_step(self, batch: Batch, step: int) -> BatchUpdate:
        shards = assign_to_ranks(batch.lengths_n, self.data_parallel_size)
        results = self._call_on_shards("train_step", batch, shards, step)
        first, seconds = results[0], max(r.seconds_in_routes for r in results)
        old = self._joined(batch, shards, results, 0.0) if batch.old_log_probs_N is None else None
        return BatchUpdate(first.metrics, first.replay, seconds, first.skipped, old, first.load)

    def connect_engines(self, targets: Sequence[Any]) -> None:
        """Connect the first rank to the engines, as the sender of weights; it leaves those of an earlier call."""
        first = self._members[0]
        call = first.handle.connect_engines.remote(targets)
        self._waiting.wait_for({call: (first.name, first.log)}, "connect_engines")

    def update_weights(self, version: int) -> str:
        """Send the weights to the connected engines; return why an engine did not take them, or an empty text."""
        return next((failure for failure in self._call("update_weights", version) if failure), "")

    def take_snapshot(self) -> None:
        """Every rank copies its part of the model and its optimizer into its host's memory."""
        self._call("take_snapshot")

    def write_snapshot(self, path: Path) -> dict[str, FileSum]:
        """Have every rank write its part of the snapshot, beside calls from other threads.

        Returns:
            Checksums of all files, by name.
        """
        return {name: found for sums in self._call("write_snapshot", path) for name, found in sums.items()}

    def load_checkpoint(self, path: Path) -> None:
        """Have every rank load its part of a checkpoint written by `write_snapshot`."""
        self._call("load_checkpoint", path)

    def save_hf(self, path: Path) -> dict[str, int]:
        """Write the weights, config and tokenizer as a Hugging Face checkpoint; bytes of each file, by name."""
        sizes: dict[str, int] = self._call("save_hf", path)[0]
        return sizes

    def _call_on_shards(self, method: str, batch: Batch, shards: Sequence[IntArray], *rest: Any) -> list[Any]:
        """Every rank gets its data-parallel shard, stored once per shard."""
        refs = [ray.put(batch.select(shard)) for shard in shards]
        return self._call_each(method, [(refs[dp_rank], *rest) for dp_rank, _, _ in self._places])
