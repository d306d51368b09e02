"""Megatron-core as the backend of a policy. Shape legend as in `roll_r3.trainers.backend`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state

from roll_r3.algorithms.stats import TokenStats
from roll_r3.batch.data_parallel import DataParallel
from roll_r3.batch.micro_batch import KeptSlots, MicroBatch
from roll_r3.batch.route_pieces import ReadRoutes
from roll_r3.batch.token_map import Layout
from roll_r3.config.model_role import Learning, ModelRole
from roll_r3.config.strategies import MegatronConfig
from roll_r3.errors import ConfigError
from roll_r3.models.facts import ModelFacts
from roll_r3.models.layer_map import chunk_layers
from roll_r3.platform import megatron_cpu
from roll_r3.replay.observer import Observer
from roll_r3.replay.session import RoutingSession
from roll_r3.strategies.base import ProcessInfo, Snapshot
from roll_r3.trainers.cutting import CutRules
from roll_r3.trainers.megatron import checkpoint, parallel
from roll_r3.trainers.megatron.audit import DispatchAudit
from roll_r3.trainers.megatron.expert_bias import RealTokenCounts
from roll_r3.trainers.megatron.model import DTYPES, build_model
from roll_r3.trainers.megatron.optimizer import Optimizer
from roll_r3.trainers.megatron.routers import Router
from roll_r3.trainers.megatron.schedule import run_schedule
from roll_r3.trainers.megatron.token_values import label_log_probs_and_entropy
from roll_r3.trainers.objective import Objective, TokenValues


class MegatronBackend:
    """`Backend` of megatron-core: every parallel layout."""

    def __init__(self, role: ModelRole, process: ProcessInfo, *, trains: bool) -> None:
        """As `BackendClass`."""
        settings = role.section.strategy_args.strategy_config
        assert isinstance(settings, MegatronConfig), "the registry gives each strategy its own settings"
        self._role = role
        self._settings = settings
        self._process = process
        self._trains = trains
        self.layout = parallel.RankLayout.of(settings, process, role.path)
        self._tokens = self.layout.token_layout(role.section.use_sequence_packing, role.section.sequence_length_round)

    @property
    def data_parallel_rank(self) -> int:
        return self.layout.dp_rank

    @property
    def data_parallel_size(self) -> int:
        return self.layout.dp_size

    @property
    def returns_results(self) -> bool:
        return self.layout.returns_results

    def prepare_thread(self) -> None:
        megatron_cpu.install()

    def initialize(self, facts: ModelFacts) -> None:
        self.device = parallel.join(self._process, self.layout, self._role.seed)
        self.model = build_model(
            self._role.checkpoint,
            self._role.section.model_args,
            self._settings,
            self.layout,
            self.device,
            replays=self._role.replay_mode != "disable",
            trains=self._trains,
            fp32_lm_head=self._role.fp32_lm_head,
        )
        self._check_layers(facts)
        group = parallel_state.get_data_parallel_group()
        self.data_parallel = DataParallel(self.layout.dp_rank, self.layout.dp_size, self.device, group)

    def make_optimizer(self, learning: Learning) -> None:
        self.optimizer = Optimizer(
            self.model.chunks,
            learning.args,
            dtype=DTYPES[self._role.section.model_args.dtype],
            distributed=self._settings.use_distributed_optimizer,
            total_steps=learning.total_optimizer_steps,
        )

    @property
    def cut_rules(self) -> CutRules:
        return CutRules(
            self._tokens,
            multiple=self.layout.pp_size if self.layout.vpp_size else 1,
            # the allgather dispatcher exchanges equal shapes between expert-parallel ranks
            same_width=self._settings.moe_token_dispatcher_type == "allgather" and self.layout.ep_size > 1,
        )

    @property
    def expert_parallel_size(self) -> int:
        return self.layout.ep_size

    @property
    def routers(self) -> list[list[Router]]:
        return self.model.routers

    def run(
        self,
        micro_batches: Sequence[MicroBatch],
        objective: Objective,
        session: RoutingSession[Any] | None,
        *,
        forward_only: bool,
        observers: Sequence[Observer] = (),
    ) -> list[TokenValues]:
        return run_schedule(
            self.model, micro_batches, objective, session, forward_only=forward_only, observers=observers
        )

    def token_values(
        self,
        logits_BSV: torch.Tensor,
        labels_BS: torch.Tensor,
        kept: KeptSlots | None,
        *,
        temperature: float,
        entropy_gradient: bool,
    ) -> TokenValues:
        return label_log_probs_and_entropy(
            logits_BSV,
            labels_BS,
            kept,
            temperature=temperature,
            vocab_size=self.model.vocab_size,
            entropy_gradient=entropy_gradient,
        )

    @property
    def has_logits(self) -> bool:
        return self.layout.is_last_stage

    def sum_over_context_ranks(self, values: torch.Tensor) -> None:
        if self.layout.cp_size > 1:
            dist.all_reduce(values, group=parallel_state.get_context_parallel_group())

    def reduced(self, stats: TokenStats) -> dict[str, float]:
        """As `Backend.reduced`. Statistics arise on the last pipeline stage, which sends them to the others."""
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

    def pieces(self, tensor: torch.Tensor) -> list[tuple[Layout, torch.Tensor]]:
        groups = (parallel_state.get_tensor_model_parallel_group(), parallel_state.get_context_parallel_group())
        return [
            (replace(self._tokens, cp_rank=cp_rank, sp_rank=sp_rank), piece)
            for sp_rank, part in enumerate(_gather(tensor, groups[0], self.layout.sp_size))
            for cp_rank, piece in enumerate(_gather(part, groups[1], self.layout.cp_size))
        ]

    def step_observers(self) -> list[RealTokenCounts]:
        """As `Backend.step_observers`: one that counts the tokens of experts whose bias moves."""
        config = self.model.config
        moves = config.moe_router_enable_expert_bias and config.moe_router_bias_update_rate
        return [RealTokenCounts(self.model.chunks)] if moves else []

    def audit(
        self, num_micro_batches: int, *, layer_rows: Mapping[int, int], top_k: int, read: ReadRoutes
    ) -> DispatchAudit:
        return DispatchAudit(self.model, num_micro_batches, layer_rows=layer_rows, top_k=top_k, read=read)

    def export_weights(self) -> Iterator[tuple[str, torch.Tensor]]:
        """As `Backend.export_weights`; the first rank alone gets the tensors."""
        return self.model.export_weights()

    def load_weights(self, path: Path) -> None:
        checkpoint.load_weights(self.model, path)

    def snapshot(self) -> Snapshot:
        return checkpoint.snapshot(self.model, self.optimizer)

    def load_checkpoint(self, path: Path) -> None:
        checkpoint.load(self.model, self.optimizer, path)

    def close(self) -> None:
        self.model.release()
        del self.model
        parallel.leave()

    def _check_layers(self, facts: ModelFacts) -> None:
        """Raise ConfigError unless megatron built the routers of the MoE layers that the layout puts here."""
        try:
            planned = chunk_layers(facts.num_layers, self._settings)[self.layout.pp_rank]
        except ValueError as error:
            raise ConfigError(f"{self._role.path}.{error}") from error
        wanted = [[layer for layer in chunk if layer in facts.moe_layers] for chunk in planned]
        built = [[router.layer for router in chunk] for chunk in self.model.routers]
        if built != wanted:
            raise ConfigError(
                f"{self._role.checkpoint}: megatron built routers of the layers {built} in the chunks of stage "
                f"{self.layout.pp_rank}, where config.json and the layout say {wanted}"
            )


def _gather(tensor: torch.Tensor, group: dist.ProcessGroup, size: int) -> list[torch.Tensor]:
    """Return every rank's tensor, in rank order; collective."""
    if size == 1:
        return [tensor]
    parts = [torch.empty_like(tensor) for _ in range(size)]
    dist.all_gather(parts, tensor, group=group)
    return parts
