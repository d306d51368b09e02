"""One rank of a model that megatron-core runs: log-probabilities, and the policy that learns.

The order of things is here; what they are is in the modules beside this one. Works under Ray, under torchrun and in a
plain process alike. Shape legend as in `roll_r3.batch.batch`: n samples, N inputs.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist
from megatron.core import parallel_state

from roll_r3.algorithms.stats import TokenStats
from roll_r3.batch.batch import Batch
from roll_r3.batch.data_parallel import DataParallel
from roll_r3.batch.grouping import fixed_size
from roll_r3.batch.micro_batch import MicroBatch
from roll_r3.batch.route_pieces import ReadRoutes, read_held
from roll_r3.batch.token_map import Layout, round_up
from roll_r3.config.derived import algorithm_of, checkpoint_of, infer_batch_size, infer_budget
from roll_r3.config.pipeline import RLVRConfig
from roll_r3.config.strategies import MegatronConfig
from roll_r3.config.workers import ActorTrainConfig, ReferenceConfig
from roll_r3.errors import ConfigError
from roll_r3.models.facts import read_facts
from roll_r3.models.layer_map import chunk_layers
from roll_r3.platform import megatron_cpu
from roll_r3.replay.audit import is_audited
from roll_r3.replay.counts import ReplayCounts
from roll_r3.replay.layer import Stopwatch
from roll_r3.replay.recorded import RecordedRoutes
from roll_r3.replay.session import RecordSession, ReplaySession, replaying
from roll_r3.strategies.base import LogProbResult, ProcessInfo, Role, Snapshot, TrainResult
from roll_r3.trainers.cutting import cut, fill_up, groups_within
from roll_r3.trainers.finite import FiniteSteps, LossSum
from roll_r3.trainers.hf_checkpoint import save_hf
from roll_r3.trainers.megatron import checkpoint, parallel
from roll_r3.trainers.megatron.audit import DispatchAudit
from roll_r3.trainers.megatron.expert_bias import RealTokenCounts
from roll_r3.trainers.megatron.model import DTYPES, build_model
from roll_r3.trainers.megatron.optimizer import Optimizer
from roll_r3.trainers.megatron.routers import local_layers
from roll_r3.trainers.megatron.schedule import run_schedule
from roll_r3.trainers.megatron.token_values import label_log_probs_and_entropy
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


class MegatronInfer:
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
        assert isinstance(settings, MegatronConfig), "the registry gives each strategy its own settings"
        self.config = config
        self.algorithm = algorithm_of(config)
        self.role = role
        self.section = section
        self.settings = settings
        self.process = process
        self.read_routes = read_routes
        self.model_path = model_path or checkpoint_of(config, role)
        self.layout = parallel.RankLayout.of(self.settings, process, f"{role}.strategy_args.strategy_config")
        self.tokens = self.layout.token_layout(section.use_sequence_packing, section.sequence_length_round)
        # the reference always routes by itself
        self.replay_mode = section.router_replay.mode if role == "actor_train" else "disable"

    @property
    def data_parallel_rank(self) -> int:
        return self.layout.dp_rank

    @property
    def data_parallel_size(self) -> int:
        return self.layout.dp_size

    @property
    def returns_results(self) -> bool:
        """True on exactly one rank of each data-parallel shard."""
        return self.layout.returns_results

    def initialize(self) -> None:
        """Join the process group, build the model, load the weights; collective.

        Raises:
            ConfigError: the checkpoint cannot be built here, or another role of this process has another layout.
        """
        megatron_cpu.install()
        self.facts = read_facts(self.model_path)
        device = parallel.join(self.process, self.layout, self.config.seed)
        self.model = build_model(
            self.model_path,
            self.section.model_args,
            self.settings,
            self.layout,
            device,
            replays=self.replay_mode != "disable",
            trains=self.trains,
            fp32_lm_head=self.config.fp32_lm_head,
        )
        self._check_layers()
        group = parallel_state.get_data_parallel_group()
        self.data_parallel = DataParallel(self.layout.dp_rank, self.layout.dp_size, device, group)
        self.recorded = RecordedRoutes(self.data_parallel, self._pieces, self.facts.num_experts)

    def compute_log_probs(self, batch: Batch) -> LogProbResult:
        """Log-probabilities and entropies of this rank's shard, without gradients; collective.

        Under R3 it replays `batch.routes`, under R2 it records the routes for `train_step`.

        Raises:
            ReplayError: R3, and the batch carries no routes, or routes that do not fit its samples.
        """
        megatron_cpu.install()
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
            session = RecordSession(self.model.routers, len(micro_batches), **self._routing())
        objective = log_prob_objective(self._token_values, self.model.device)
        values = run_schedule(self.model, micro_batches, objective, session, forward_only=True)
        if isinstance(session, RecordSession):
            with session.stopwatch.running():
                self.recorded.store(micro_batches, session.chosen)
        log_probs_N, entropy_N = self._whole(batch, micro_batches, values)
        return LogProbResult(
            log_probs_N=log_probs_N,
            entropy_N=entropy_N,
            replay=summed_counts([session.counts], self.model.device) if isinstance(session, ReplaySession) else None,
            seconds_in_routes=session.stopwatch.seconds if session else 0.0,
        )

    def load_weights(self, path: Path) -> None:
        """As `InferStrategy.load_weights`."""
        megatron_cpu.install()
        checkpoint.load_weights(self.model, path)

    def export_weights(self) -> Iterator[tuple[str, torch.Tensor]]:
        """(Hugging Face name, whole tensor) pairs, on the first rank; collective.

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
        parallel.leave()

    def _check_layers(self) -> None:
        """The routers that megatron built are those of the MoE layers that the layout puts here."""
        try:
            planned = chunk_layers(self.facts.num_layers, self.settings)[self.layout.pp_rank]
        except ValueError as error:
            raise ConfigError(f"{self.role}.strategy_args.strategy_config.{error}") from error
        wanted = [[layer for layer in chunk if layer in self.facts.moe_layers] for chunk in planned]
        built = [[router.layer for router in chunk] for chunk in self.model.routers]
        if built != wanted:
            raise ConfigError(
                f"{self.model_path}: megatron built routers of the layers {built} in the chunks of stage "
                f"{self.layout.pp_rank}, where config.json and the layout say {wanted}"
            )

    def _cut(self, batch: Batch, *, size: int, max_tokens: int | None) -> list[MicroBatch]:
        """Micro-batches of `size` samples, or of as many as `max_tokens` hold; collective over data-parallel ranks."""
        # the interleaved schedule passes micro-batches round the stages
        multiple = self.layout.pp_size if self.layout.vpp_size else 1
        if max_tokens is None:
            groups = fixed_size(batch.num_samples, size)
            number = round_up(len(groups), multiple)
        else:
            groups, number = groups_within(
                batch.lengths_n, max_tokens, self.tokens, self.data_parallel, multiple=multiple
            )
        # the allgather dispatcher exchanges equal shapes between expert-parallel ranks
        same_width = self.settings.moe_token_dispatcher_type == "allgather" and self.layout.ep_size > 1
        return fill_up(
            cut(batch, groups, self.tokens, same_width_on=self.data_parallel if same_width else None), number
        )

    def _replay(
        self, batch: Batch, micro_batches: Sequence[MicroBatch], *, forward_only: bool, compares: bool
    ) -> tuple[ReplaySession, list[MicroBatch]]:
        """A session, and the micro-batches with the rows that it will replay."""
        check_routes(batch, self.role, self.replay_mode)
        return replaying(
            micro_batches,
            self.model.routers,
            **self._routing(),
            layer_rows=self._layer_rows(),
            read=self.read_routes,
            forward_only=forward_only,
            compares=compares and self.replay_mode == "R3",  # R2's rows are the live choice itself
        )

    def _layer_rows(self) -> dict[int, int]:
        """Global layer -> its row in a sample's routes."""
        # what the rollout recorded covers every MoE layer, a recording pass of this rank only its own
        layers = self.facts.moe_layers if self.replay_mode == "R3" else local_layers(self.model.routers)
        return {layer: row for row, layer in enumerate(layers)}

    def _routing(self) -> dict[str, Any]:
        """What every routing session of this rank needs."""
        return {"facts": self.facts, "ep_size": self.layout.ep_size, "device": self.model.device}

    def _token_values(self, logits_BSV: torch.Tensor, labels_BS: torch.Tensor, entropy_gradient: bool) -> TokenValues:
        return label_log_probs_and_entropy(
            logits_BSV,
            labels_BS,
            temperature=self.config.actor_infer.generating_args.temperature,
            vocab_size=self.model.vocab_size,
            entropy_gradient=entropy_gradient,
        )

    def _pieces(self, tensor: torch.Tensor) -> list[tuple[Layout, torch.Tensor]]:
        """The tensor of every rank that splits this rank's sequences, and where it lies; collective over them."""
        groups = (parallel_state.get_tensor_model_parallel_group(), parallel_state.get_context_parallel_group())
        return [
            (replace(self.tokens, cp_rank=cp_rank, sp_rank=sp_rank), piece)
            for sp_rank, part in enumerate(_gather(tensor, groups[0], self.layout.sp_size))
            for cp_rank, piece in enumerate(_gather(part, groups[1], self.layout.cp_size))
        ]

    def _whole(
        self, batch: Batch, micro_batches: Sequence[MicroBatch], values: Sequence[TokenValues]
    ) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]] | tuple[None, None]:
        """Values of all inputs of the shard, in the batch's order; only on the ranks of the last stage."""
        if not self.layout.is_last_stage:
            return None, None
        whole_N2 = torch.from_numpy(placed(batch, micro_batches, values)).to(self.model.device)
        if self.layout.cp_size > 1:
            dist.all_reduce(whole_N2, group=parallel_state.get_context_parallel_group())
        if not self.returns_results:
            return None, None
        log_probs_N, entropy_N = whole_N2.T.contiguous().cpu().numpy()
        return log_probs_N, entropy_N


class MegatronTrain(MegatronInfer):
    """A `TrainStrategy`: the policy that learns."""

    trains: ClassVar[bool] = True
    section: ActorTrainConfig

    def initialize(self) -> None:
        """Join the process group, build the model, load the weights, make the optimizer; collective."""
        super().initialize()
        assert isinstance(self.section, ActorTrainConfig)
        self.training_args = self.section.training_args
        self.optimizer = Optimizer(
            self.model.chunks,
            self.training_args,
            dtype=DTYPES[self.section.model_args.dtype],
            distributed=self.settings.use_distributed_optimizer,
            total_steps=total_optimizer_steps(self.config),
        )
        self.finite_steps = FiniteSteps(self.training_args.max_skipped_steps, self.model.device)

    def train_step(self, batch: Batch, step: int) -> TrainResult:
        """All optimizer steps on this rank's shard of step `step`; collective.

        Raises:
            ReplayError: R3 without routes, R2 without a recording pass, a row that was not used exactly once, or a
                token that the audit found at other experts than recorded.
            RollError: more optimizer steps in a row than `max_skipped_steps` whose gradient or loss is not finite.
        """
        megatron_cpu.install()
        attaching = Stopwatch()
        if self.replay_mode == "R2":
            with attaching.running():
                batch = self.recorded.attach(batch)
        parts = mini_batches(self.config, batch, step, self.layout.dp_rank)
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
            real_tokens = self._real_token_counts()
            watching = [observer for observer in (real_tokens, audit) if observer]
            values = run_schedule(self.model, micro_batches, objective, session, forward_only=False, observers=watching)
            if audit:  # before the weights learn from a wrong route
                audit.verify()
            norm = self.optimizer.grad_norm()
            if wrong := self.finite_steps.what_is_wrong(norm, loss):
                if real_tokens:
                    real_tokens.put_back()
                skipped.append(self.finite_steps.skipped(step, number, wrong))
            else:
                figures.append(self.optimizer.step(norm))
                stats.merge(here)
                self.finite_steps.made()
            if session:
                counts.append(session.counts if audit is None else audit.added_to(session.counts))
                seconds += session.stopwatch.seconds
        log_probs_N, entropy_N = self._whole(batch, micro_batches, values) if on_policy else (None, None)
        return TrainResult(
            metrics=self._reduced(stats) | step_metrics(figures, skipped),
            replay=summed_counts(counts, self.model.device) if counts else None,
            seconds_in_routes=seconds,
            skipped=tuple(skipped),
            log_probs_N=log_probs_N,
            entropy_N=entropy_N,
        )

    def _audit(self, num_micro_batches: int, step: int) -> DispatchAudit | None:
        """For one optimizer step of a training step that is audited."""
        if not is_audited(self.section.router_replay, step):
            return None
        return DispatchAudit(
            self.model, num_micro_batches, layer_rows=self._layer_rows(), top_k=self.facts.top_k, read=self.read_routes
        )

    def _real_token_counts(self) -> RealTokenCounts | None:
        """For one optimizer step of a model whose expert bias moves."""
        config = self.model.config
        if not config.moe_router_enable_expert_bias or not config.moe_router_bias_update_rate:
            return None
        return RealTokenCounts(self.model.chunks)

    def _reduced(self, stats: TokenStats) -> dict[str, float]:
        """Token statistics over all ranks, on every rank; they arise on the last pipeline stage."""
        group = parallel_state.get_data_parallel_group(with_context_parallel=True)
        operations = {"sum": dist.ReduceOp.SUM, "max": dist.ReduceOp.MAX}

        def all_reduce(values: torch.Tensor, operation: str) -> None:
            dist.all_reduce(values, operations[operation], group=group)

        box = [stats.reduce(all_reduce) if self.layout.is_last_stage else {}]
        if self.layout.pp_size > 1:
            dist.broadcast_object_list(
                box,
                src=parallel_state.get_pipeline_model_parallel_last_rank(),
                group=parallel_state.get_pipeline_model_parallel_group(),
            )
        return box[0]

    def snapshot(self) -> Snapshot:
        """As `TrainStrategy.snapshot`: the fp32 weights and the buffers (an expert bias), Adam's moments, and the
        number of optimizer steps taken, which is the position in the learning-rate schedule."""
        megatron_cpu.install()
        return checkpoint.snapshot(self.model, self.optimizer)

    def load_checkpoint(self, path: Path) -> None:
        """As `TrainStrategy.load_checkpoint`."""
        megatron_cpu.install()
        checkpoint.load(self.model, self.optimizer, path)


def _gather(tensor: torch.Tensor, group: dist.ProcessGroup, size: int) -> list[torch.Tensor]:
    """Every rank's tensor, in rank order."""
    if size == 1:
        return [tensor]
    parts = [torch.empty_like(tensor) for _ in range(size)]
    dist.all_gather(parts, tensor, group=group)
    return parts
