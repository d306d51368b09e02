"""Order of a step, for every backend: log-probabilities, and the learning policy.

A policy is one rank. Its backend runs the model (`roll_r3.trainers.backend`). Policies work under Ray, under torchrun
and in a plain process. Shape legend as in `roll_r3.batch.batch`: n samples, N inputs.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
import torch

from roll_r3.algorithms.stats import TokenStats
from roll_r3.batch.batch import Batch
from roll_r3.batch.micro_batch import KeptSlots, MicroBatch
from roll_r3.batch.route_pieces import ReadRoutes, read_held
from roll_r3.config.model_role import Learning, ModelRole
from roll_r3.errors import ConfigError
from roll_r3.models.facts import read_facts
from roll_r3.replay.audit import Audit, is_audited
from roll_r3.replay.choice_counts import LayerLoads
from roll_r3.replay.counts import ReplayCounts
from roll_r3.replay.layer import Stopwatch
from roll_r3.replay.recorded import RecordedRoutes
from roll_r3.replay.session import RecordSession, ReplaySession, replaying
from roll_r3.strategies.base import LogProbResult, ProcessInfo, Snapshot, TrainResult
from roll_r3.trainers.backend import BackendClass
from roll_r3.trainers.cutting import cut_shard
from roll_r3.trainers.finite import FiniteSteps, LossSum
from roll_r3.trainers.hf_checkpoint import save_hf
from roll_r3.trainers.objective import TokenValues, log_prob_objective, placed, policy_objective
from roll_r3.trainers.update import (
    StepFigures,
    check_routes,
    denominators,
    is_on_policy,
    mini_batches,
    step_metrics,
    summed_counts,
    summed_load,
)

ShardValues = tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]] | tuple[None, None]
"""Log-probabilities and entropies of a shard's inputs, in the batch's order, fp32 [N] each; None where another rank
returns them."""


class InferPolicy:
    """`InferStrategy` over a backend: log-probabilities under frozen weights."""

    trains: ClassVar[bool] = False
    backend_class: ClassVar[BackendClass]

    def __init__(self, role: ModelRole, process: ProcessInfo, *, read_routes: ReadRoutes = read_held) -> None:
        """
        Args:
            process: this rank's place in the world.
            read_routes: reads `batch.routes`; by default this process must hold them.

        Raises:
            ConfigError: another number of devices than ranks, or conflicting settings.
        """
        devices = len(role.section.device_mapping)
        if devices != process.world_size:
            raise ConfigError(
                f"{role.name}.device_mapping names {devices} devices, but the world has {process.world_size} ranks: "
                "name one device for each"
            )
        self.role = role
        self.replay_mode = role.replay_mode
        self.read_routes = read_routes
        self.backend = self.backend_class(role, process, trains=self.trains)

    @property
    def data_parallel_rank(self) -> int:
        return self.backend.data_parallel_rank

    @property
    def data_parallel_size(self) -> int:
        return self.backend.data_parallel_size

    @property
    def returns_results(self) -> bool:
        """True on exactly one rank of each data-parallel shard."""
        return self.backend.returns_results

    def initialize(self) -> None:
        """As `InferStrategy.initialize`; collective.

        Raises:
            ConfigError: the checkpoint cannot be built here, or another role of this process has another layout.
        """
        self.backend.prepare_thread()
        self.facts = read_facts(self.role.checkpoint)
        self.backend.initialize(self.facts)
        self.recorded = RecordedRoutes(self.backend.data_parallel, self.backend.pieces, self.facts.num_experts)

    def compute_log_probs(self, batch: Batch) -> LogProbResult:
        """Compute log-probabilities and entropies of this rank's shard, without gradients; collective.

        Under R3 the pass replays `batch.routes`. Under R2 it records the routes for `train_step`.

        Raises:
            ReplayError: R3, and the batch carries no routes, or routes of other samples or another model.
        """
        self.backend.prepare_thread()
        micro_batches = self._cut(batch, size=self.role.infer_batch_size, max_tokens=self.role.infer_budget)
        session: ReplaySession | RecordSession | None = None
        if self.replay_mode == "R3":
            session, micro_batches = self._replay(batch, micro_batches, forward_only=True, compares=True)
        elif self.replay_mode == "R2":
            self.recorded.clear()
            session = RecordSession(self.backend.routers, len(micro_batches), **self._routing())
        objective = log_prob_objective(self._token_values, self.backend.device)
        values = self.backend.run(micro_batches, objective, session, forward_only=True)
        if isinstance(session, RecordSession):
            with session.stopwatch.running():
                self.recorded.store(micro_batches, session.chosen)
        log_probs_N, entropy_N = self._whole(batch, micro_batches, values)
        return LogProbResult(
            log_probs_N=log_probs_N,
            entropy_N=entropy_N,
            replay=summed_counts([session.counts], self.backend.device) if isinstance(session, ReplaySession) else None,
            seconds_in_routes=session.stopwatch.seconds if session else 0.0,
            load=summed_load([session.loads], self.facts, self.backend.device) if session else None,
        )

    def load_weights(self, path: Path) -> None:
        """As `InferStrategy.load_weights`."""
        self.backend.prepare_thread()
        self.backend.load_weights(path)

    def export_weights(self) -> Iterator[tuple[str, torch.Tensor]]:
        """As `Backend.export_weights`."""
        yield from self.backend.export_weights()

    def save_hf(self, path: Path) -> dict[str, int]:
        """As `InferStrategy.save_hf`."""
        return save_hf(self.export_weights(), Path(self.role.checkpoint), path)

    def close(self) -> None:
        """Release the model and leave the process group."""
        self.backend.close()

    def _cut(self, batch: Batch, *, size: int, max_tokens: int | None) -> list[MicroBatch]:
        """Cut the shard as the backend wants it; collective over data-parallel ranks."""
        backend = self.backend
        return cut_shard(batch, backend.cut_rules, backend.data_parallel, size=size, max_tokens=max_tokens)

    def _replay(
        self, batch: Batch, micro_batches: Sequence[MicroBatch], *, forward_only: bool, compares: bool
    ) -> tuple[ReplaySession, list[MicroBatch]]:
        """Return a session, and the micro-batches with the rows to replay."""
        check_routes(batch, self.role.name, self.replay_mode)
        return replaying(
            micro_batches,
            self.backend.routers,
            **self._routing(),
            layer_rows=self._layer_rows(),
            read=self.read_routes,
            forward_only=forward_only,
            compares=compares and self.replay_mode == "R3",  # R2's rows are the live choice itself
        )

    def _layer_rows(self) -> dict[int, int]:
        """Return global layer -> its row in a sample's routes."""
        # the engine records every MoE layer, a recording pass of this rank only the rank's own
        own = [router.layer for chunk in self.backend.routers for router in chunk]
        layers = self.facts.moe_layers if self.replay_mode == "R3" else own
        return {layer: row for row, layer in enumerate(layers)}

    def _routing(self) -> dict[str, Any]:
        """Return the arguments of every routing session of this rank."""
        return {
            "facts": self.facts,
            "ep_size": self.backend.expert_parallel_size,
            "device": self.backend.device,
        }

    def _token_values(
        self, logits_BSV: torch.Tensor, labels_BS: torch.Tensor, kept: KeptSlots | None, entropy_gradient: bool
    ) -> TokenValues:
        return self.backend.token_values(
            logits_BSV, labels_BS, kept, temperature=self.role.temperature, entropy_gradient=entropy_gradient
        )

    def _whole(self, batch: Batch, micro_batches: Sequence[MicroBatch], values: Sequence[TokenValues]) -> ShardValues:
        """Return the values of the whole shard; collective over ranks with logits."""
        if not self.backend.has_logits:
            return None, None
        whole_N2 = torch.from_numpy(placed(batch, micro_batches, values)).to(self.backend.device)
        self.backend.sum_over_context_ranks(whole_N2)
        if not self.returns_results:
            return None, None
        log_probs_N, entropy_N = whole_N2.T.cpu().numpy().copy()
        return log_probs_N, entropy_N


@dataclass
class _Outcome:
    """Results of a training step's optimizer steps."""

    stats: TokenStats = field(default_factory=TokenStats)
    figures: list[StepFigures] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)
    counts: list[ReplayCounts] = field(default_factory=list)
    loads: list[LayerLoads] = field(default_factory=list)
    seconds_in_routes: float = 0.0


class TrainPolicy(InferPolicy):
    """`TrainStrategy` over a backend: the learning policy."""

    trains: ClassVar[bool] = True

    @property
    def learning(self) -> Learning:
        """Settings of the optimizer steps."""
        assert self.role.learning is not None, f"{self.role.name} does not learn"
        return self.role.learning

    def initialize(self) -> None:
        """As `TrainStrategy.initialize`: the model, and its optimizer; collective."""
        super().initialize()
        self.backend.make_optimizer(self.learning)
        self.finite_steps = FiniteSteps(self.learning.args.max_skipped_steps, self.backend.device)

    def train_step(self, batch: Batch, step: int) -> TrainResult:
        """Make all optimizer steps on this rank's shard of step `step`; collective.

        Raises:
            ReplayError: R3 without routes, R2 without a recording pass, a row not used exactly once, or a token found
                by the audit at other experts than recorded.
            RollError: more than `max_skipped_steps` optimizer steps in a row without a finite gradient and loss.
        """
        self.backend.prepare_thread()
        attaching = Stopwatch()
        if self.replay_mode == "R2":
            with attaching.running():
                batch = self.recorded.attach(batch)
        parts = mini_batches(self.learning, batch, seed=self.role.seed, step=step, dp_rank=self.data_parallel_rank)
        on_policy = is_on_policy(batch, parts)
        totals = denominators(parts, self.learning.algorithm.loss_agg_mode, self.backend.data_parallel)
        unseen = on_policy or self.learning.algorithm.rollout_correction.bypass  # by a pass before the update
        outcome = _Outcome(seconds_in_routes=attaching.seconds)
        log_probs_N = entropy_N = None
        for number, (mini_batch, denominator) in enumerate(zip(parts, totals, strict=True), 1):
            if not denominator and not on_policy:
                continue  # weight decay and momentum would move the weights
            micro_batches, values = self._optimizer_step(
                mini_batch, max(denominator, 1.0), outcome, step=step, number=number, compares=unseen
            )
            unseen = False  # later optimizer steps have other weights
            if on_policy:  # the one optimizer step, on the samples of the batch in its order
                log_probs_N, entropy_N = self._whole(batch, micro_batches, values)
        return TrainResult(
            metrics=self.backend.reduced(outcome.stats) | step_metrics(outcome.figures, outcome.skipped),
            replay=summed_counts(outcome.counts, self.backend.device) if outcome.counts else None,
            load=summed_load(outcome.loads, self.facts, self.backend.device) if outcome.loads else None,
            seconds_in_routes=outcome.seconds_in_routes,
            skipped=tuple(outcome.skipped),
            log_probs_N=log_probs_N,
            entropy_N=entropy_N,
        )

    def snapshot(self) -> Snapshot:
        """As `TrainStrategy.snapshot`."""
        self.backend.prepare_thread()
        return self.backend.snapshot()

    def load_checkpoint(self, path: Path) -> None:
        """As `TrainStrategy.load_checkpoint`."""
        self.backend.prepare_thread()
        self.backend.load_checkpoint(path)

    def _optimizer_step(
        self, mini_batch: Batch, denominator: float, outcome: _Outcome, *, step: int, number: int, compares: bool
    ) -> tuple[list[MicroBatch], list[TokenValues]]:
        """Make one optimizer step, or skip it where a figure is not finite; collective.

        Args:
            denominator: denominator of the step's loss.
            outcome: receives the step's results.
            number: optimizer step of training step `step`, counted from 1.
            compares: count where live routers choose as replayed.

        Returns:
            The micro-batches, and the values of each on ranks with logits.
        """
        micro_batches = self._cut(
            mini_batch, size=self.learning.args.per_device_train_batch_size, max_tokens=self.learning.max_tokens
        )
        session = audit = None
        if self.replay_mode != "disable":
            session, micro_batches = self._replay(mini_batch, micro_batches, forward_only=False, compares=compares)
            audit = self._audit(len(micro_batches), step)
        stats, loss = TokenStats(), LossSum()
        backend, algorithm = self.backend, self.learning.algorithm
        objective = policy_objective(
            self._token_values, backend.device, algorithm, denominator, stats, loss, backend.sum_over_context_ranks
        )
        self.backend.optimizer.zero_grad()
        own = self.backend.step_observers()
        observers = [*own, *([audit] if audit else [])]
        values = self.backend.run(micro_batches, objective, session, forward_only=False, observers=observers)
        if audit:  # before the weights learn from a wrong route
            audit.verify()
        norm = self.backend.optimizer.grad_norm()
        if reason := self.finite_steps.non_finite(norm, loss):
            for observer in own:
                observer.rewind()
            outcome.skipped.append(self.finite_steps.skipped(step, number, reason))
        else:
            outcome.figures.append(self.backend.optimizer.step(norm))
            outcome.stats.merge(stats)
            self.finite_steps.made()
        if session:
            outcome.counts.append(session.counts if audit is None else audit.added_to(session.counts))
            if session.compares:
                outcome.loads.append(session.loads)
            outcome.seconds_in_routes += session.stopwatch.seconds
        return micro_batches, values

    def _audit(self, num_micro_batches: int, step: int) -> Audit | None:
        """Return the audit of one optimizer step; None in a training step without one."""
        if not is_audited(self.role.section.router_replay, step):
            return None
        return self.backend.audit(
            num_micro_batches, layer_rows=self._layer_rows(), top_k=self.facts.top_k, read=self.read_routes
        )
