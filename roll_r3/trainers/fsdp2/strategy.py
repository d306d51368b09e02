"""One rank of a model that transformers computes under FSDP2: log-probabilities, and the policy that learns.

Every rank is a data-parallel shard of its own. The order of things is here; what they are is in the modules beside this
one and above it. Shape legend as in `roll_r3.batch.batch`: n samples, N inputs.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch

from roll_r3.algorithms.stats import TokenStats
from roll_r3.batch.batch import Batch
from roll_r3.batch.data_parallel import DataParallel
from roll_r3.batch.grouping import fixed_size
from roll_r3.batch.micro_batch import MicroBatch
from roll_r3.batch.route_pieces import ReadRoutes, read_held
from roll_r3.batch.token_map import Layout
from roll_r3.config.derived import algorithm_of, checkpoint_of, infer_batch_size, infer_budget
from roll_r3.config.pipeline import RLVRConfig
from roll_r3.config.strategies import Fsdp2Config
from roll_r3.config.workers import ActorTrainConfig, ReferenceConfig
from roll_r3.errors import ConfigError
from roll_r3.models.facts import read_facts
from roll_r3.replay.audit import is_audited
from roll_r3.replay.counts import ReplayCounts
from roll_r3.replay.layer import Stopwatch
from roll_r3.replay.recorded import RecordedRoutes
from roll_r3.replay.session import RecordSession, ReplaySession, replaying
from roll_r3.strategies.base import LogProbResult, ProcessInfo, Role, Snapshot, TrainResult
from roll_r3.trainers import checkpoint, world
from roll_r3.trainers.cutting import cut, fill_up, groups_within, most
from roll_r3.trainers.finite import FiniteSteps, LossSum
from roll_r3.trainers.fsdp2.audit import ExpertsAudit
from roll_r3.trainers.fsdp2.model import build_model
from roll_r3.trainers.fsdp2.optimizer import Optimizer
from roll_r3.trainers.fsdp2.schedule import run_micro_batches
from roll_r3.trainers.fsdp2.token_values import label_log_probs_and_entropy
from roll_r3.trainers.hf_checkpoint import save_hf
from roll_r3.trainers.objective import TokenValues, log_prob_objective, placed, policy_objective
from roll_r3.trainers.role_check import check_role
from roll_r3.trainers.update import (
    StepFigures,
    check_routes,
    denominators,
    is_on_policy,
    mini_batches,
    step_metrics,
    summed_counts,
    total_optimizer_steps,
)


class Fsdp2Infer:
    """An `InferStrategy`: log-probabilities under frozen weights."""

    trains: ClassVar[bool] = False

    def __init__(
        self,
        config: RLVRConfig,
        role: Role,
        process: ProcessInfo,
        *,
        model_path: str | None = None,
        read_routes: ReadRoutes = read_held,
    ) -> None:
        """
        Args:
            role: which section of `config` this rank belongs to.
            process: this rank's place in the world.
            model_path: checkpoint directory, where the configuration names none that is on this disk.
            read_routes: how `batch.routes` are read; by default this process must hold them.

        Raises:
            ConfigError: settings that cannot work together (see `check_role`).
        """
        check_role(config, role, process.world_size)
        section: ActorTrainConfig | ReferenceConfig = getattr(config, role)
        settings = section.strategy_args.strategy_config
        if not isinstance(settings, Fsdp2Config):
            raise ConfigError(f"{role}.strategy_args.strategy_name is {section.strategy_args.strategy_name}, not fsdp2")
        self.config = config
        self.algorithm = algorithm_of(config)
        self.role = role
        self.section = section
        self.settings = settings
        self.process = process
        self.read_routes = read_routes
        self.model_path = model_path or checkpoint_of(config, role)
        self.tokens = Layout(
            packed=section.use_sequence_packing, multiple=section.sequence_length_round, batch_outer=True
        )
        # the reference always routes by itself
        self.replay_mode = section.router_replay.mode if role == "actor_train" else "disable"

    @property
    def data_parallel_rank(self) -> int:
        return self.process.rank

    @property
    def data_parallel_size(self) -> int:
        return self.process.world_size

    @property
    def returns_results(self) -> bool:
        return True

    def initialize(self) -> None:
        """Join the process group, build the model, load the weights; collective.

        Raises:
            ConfigError: the checkpoint cannot be built here (see `build_model`).
        """
        self.facts = read_facts(self.model_path)
        device = world.join(self.process)
        self.model = build_model(
            self.model_path,
            self.section.model_args,
            self.settings,
            device,
            trains=self.trains,
            fp32_lm_head=self.config.fp32_lm_head,
        )
        self.data_parallel = DataParallel(self.process.rank, self.process.world_size, device)
        # no other rank shares this one's samples
        self.recorded = RecordedRoutes(
            self.data_parallel, lambda tensor: [(self.tokens, tensor)], self.facts.num_experts
        )

    def compute_log_probs(self, batch: Batch) -> LogProbResult:
        """Log-probabilities and entropies of this rank's shard, without gradients; collective.

        Under R3 it replays `batch.routes`, under R2 it records the routes for `train_step`.

        Raises:
            ReplayError: R3, and the batch carries no routes, or routes that do not fit its samples.
        """
        micro_batches = self._cut(
            batch,
            size=infer_batch_size(self.config, self.section),
            max_tokens=infer_budget(self.config, self.section),
        )
        session: ReplaySession | RecordSession | None = None
        if self.replay_mode == "R3":
            session, micro_batches = self._replay(batch, micro_batches, forward_only=True, compares=True)
        elif self.replay_mode == "R2":
            self.recorded.clear()
            session = RecordSession([self.model.routers], len(micro_batches), **self._routing())
        objective = log_prob_objective(self._token_values, self.model.device)
        values = run_micro_batches(self.model, micro_batches, objective, session, forward_only=True)
        if isinstance(session, RecordSession):
            with session.stopwatch.running():
                self.recorded.store(micro_batches, session.chosen)
        log_probs_N, entropy_N = placed(batch, micro_batches, values).T.copy()
        return LogProbResult(
            log_probs_N=log_probs_N,
            entropy_N=entropy_N,
            replay=summed_counts([session.counts], self.model.device) if isinstance(session, ReplaySession) else None,
            seconds_in_routes=session.stopwatch.seconds if session else 0.0,
        )

    def load_weights(self, path: Path) -> None:
        """As `InferStrategy.load_weights`."""
        checkpoint.load([_named(_MODEL, self.model.state())], path, within=_MODEL)

    def export_weights(self) -> Iterator[tuple[str, torch.Tensor]]:
        """(Hugging Face name, whole tensor) pairs, the same on every rank; collective.

        In the training dtype, but for an expert bias, which is fp32.
        """
        yield from self.model.export_weights()

    def save_hf(self, path: Path) -> dict[str, int]:
        """As `InferStrategy.save_hf`."""
        return save_hf(self.export_weights(), Path(self.model_path), path)

    def close(self) -> None:
        """Let the model go, and leave the process group."""
        self.model.release()
        del self.model
        world.leave()

    def _cut(self, batch: Batch, *, size: int, max_tokens: int | None) -> list[MicroBatch]:
        """Micro-batches of `size` samples, or of as many as `max_tokens` hold, as many on every rank; collective."""
        if max_tokens is None:
            groups = fixed_size(batch.num_samples, size)
            number = most(len(groups), self.data_parallel)
        else:
            groups, number = groups_within(batch.lengths_n, max_tokens, self.tokens, self.data_parallel, multiple=1)
        return fill_up(cut(batch, groups, self.tokens), number)

    def _replay(
        self, batch: Batch, micro_batches: Sequence[MicroBatch], *, forward_only: bool, compares: bool
    ) -> tuple[ReplaySession, list[MicroBatch]]:
        """A session, and the micro-batches with the rows that it will replay."""
        check_routes(batch, self.role, self.replay_mode)
        return replaying(
            micro_batches,
            [self.model.routers],
            **self._routing(),
            layer_rows=self._layer_rows(),
            read=self.read_routes,
            forward_only=forward_only,
            compares=compares and self.replay_mode == "R3",  # R2's rows are the live choice itself
        )

    def _layer_rows(self) -> dict[int, int]:
        """Global layer -> its row in a sample's routes."""
        return {layer: row for row, layer in enumerate(self.facts.moe_layers)}

    def _routing(self) -> dict[str, Any]:
        """What every routing session of this rank needs."""
        return {"facts": self.facts, "ep_size": 1, "device": self.model.device}

    def _token_values(self, logits_BSV: torch.Tensor, labels_BS: torch.Tensor, entropy_gradient: bool) -> TokenValues:
        temperature = self.config.actor_infer.generating_args.temperature
        return label_log_probs_and_entropy(
            logits_BSV, labels_BS, temperature=temperature, entropy_gradient=entropy_gradient
        )


class Fsdp2Train(Fsdp2Infer):
    """A `TrainStrategy`: the policy that learns."""

    trains: ClassVar[bool] = True
    section: ActorTrainConfig

    def initialize(self) -> None:
        """Join the process group, build the model, load the weights, make the optimizer; collective."""
        super().initialize()
        assert isinstance(self.section, ActorTrainConfig)
        self.training_args = self.section.training_args
        self.optimizer = Optimizer(
            self.model.module, self.training_args, total_steps=total_optimizer_steps(self.config)
        )
        self.finite_steps = FiniteSteps(self.training_args.max_skipped_steps, self.model.device)

    def train_step(self, batch: Batch, step: int) -> TrainResult:
        """All optimizer steps on this rank's shard of step `step`; collective.

        Raises:
            ReplayError: R3 without routes, R2 without a recording pass, a row that was not used exactly once, or a
                token that the audit found at other experts than recorded.
            RollError: more optimizer steps in a row than `max_skipped_steps` whose gradient or loss is not finite.
        """
        attaching = Stopwatch()
        if self.replay_mode == "R2":
            with attaching.running():
                batch = self.recorded.attach(batch)
        parts = mini_batches(self.config, batch, step, self.data_parallel_rank)
        on_policy = is_on_policy(batch, parts)
        totals = denominators(parts, self.config.loss_agg_mode, self.data_parallel)
        stats = TokenStats()
        figures: list[StepFigures] = []
        skipped: list[str] = []
        counts: list[ReplayCounts] = []
        seconds = attaching.seconds
        for number, (mini_batch, denominator) in enumerate(zip(parts, totals, strict=True), 1):
            micro_batches = self._cut(
                mini_batch,
                size=self.training_args.per_device_train_batch_size,
                max_tokens=self.section.max_tokens_per_microbatch_in_train,
            )
            session = audit = None
            if self.replay_mode != "disable":
                session, micro_batches = self._replay(mini_batch, micro_batches, forward_only=False, compares=on_policy)
                audit = self._audit(len(micro_batches), step)
            here, loss = TokenStats(), LossSum()
            objective = policy_objective(self._token_values, self.model.device, self.algorithm, denominator, here, loss)
            self.optimizer.zero_grad()
            observers = [audit] if audit else []
            values = run_micro_batches(
                self.model, micro_batches, objective, session, forward_only=False, observers=observers
            )
            if audit:  # before the weights learn from a wrong route
                audit.verify()
            norm = self.optimizer.grad_norm()
            if wrong := self.finite_steps.what_is_wrong(norm, loss):
                skipped.append(self.finite_steps.skipped(step, number, wrong))
            else:
                figures.append(self.optimizer.step(norm))
                stats.merge(here)
                self.finite_steps.made()
            if session:
                counts.append(session.counts if audit is None else audit.added_to(session.counts))
                seconds += session.stopwatch.seconds
        log_probs_N, entropy_N = placed(batch, micro_batches, values).T.copy() if on_policy else (None, None)
        return TrainResult(
            metrics=stats.reduce(self.data_parallel.reduce) | step_metrics(figures, skipped),
            replay=summed_counts(counts, self.model.device) if counts else None,
            seconds_in_routes=seconds,
            skipped=tuple(skipped),
            log_probs_N=log_probs_N,
            entropy_N=entropy_N,
        )

    def snapshot(self) -> Snapshot:
        """As `TrainStrategy.snapshot`: the fp32 weights and the buffers (an expert bias), Adam's moments, and the
        number of optimizer steps taken, which is the position in the learning-rate schedule."""
        return checkpoint.Snapshot({name: checkpoint.host_copy(tensor) for name, tensor in self._state().items()})

    def load_checkpoint(self, path: Path) -> None:
        """As `TrainStrategy.load_checkpoint`."""
        state = self._state()
        checkpoint.load([state], path)
        self.optimizer.resume(int(state["optimizer.done"]))

    def _audit(self, num_micro_batches: int, step: int) -> ExpertsAudit | None:
        """For one optimizer step of a training step that is audited."""
        if not is_audited(self.section.router_replay, step):
            return None
        return ExpertsAudit(
            self.model, num_micro_batches, layer_rows=self._layer_rows(), top_k=self.facts.top_k, read=self.read_routes
        )

    def _state(self) -> dict[str, torch.Tensor]:
        """This rank's memory of all that a checkpoint holds."""
        return _named(_MODEL, self.model.state()) | _named(_OPTIMIZER, self.optimizer.state())


_MODEL, _OPTIMIZER = "model.", "optimizer."


def _named(prefix: str, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {f"{prefix}{name}": tensor for name, tensor in state.items()}
