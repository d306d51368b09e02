"""FSDP2 over transformers' models as the backend of a policy. Every rank is a data-parallel shard of its own.

Shape legend as in `roll_r3.trainers.backend`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from roll_r3.algorithms.stats import TokenStats
from roll_r3.batch.data_parallel import DataParallel
from roll_r3.batch.micro_batch import KeptSlots, MicroBatch
from roll_r3.batch.route_pieces import ReadRoutes
from roll_r3.batch.token_map import Layout
from roll_r3.config.model_role import Learning, ModelRole
from roll_r3.config.strategies import Fsdp2Config
from roll_r3.models.facts import ModelFacts
from roll_r3.replay.observer import Observer
from roll_r3.replay.session import RoutingSession
from roll_r3.strategies.base import ProcessInfo, Snapshot
from roll_r3.trainers import checkpoint, world
from roll_r3.trainers.backend import StepObserver
from roll_r3.trainers.cutting import CutRules
from roll_r3.trainers.fsdp2.audit import ExpertsAudit
from roll_r3.trainers.fsdp2.model import build_model
from roll_r3.trainers.fsdp2.optimizer import Optimizer
from roll_r3.trainers.fsdp2.routers import HookedRouter
from roll_r3.trainers.fsdp2.schedule import run_micro_batches
from roll_r3.trainers.fsdp2.token_values import label_log_probs_and_entropy
from roll_r3.trainers.objective import Objective, TokenValues

_MODEL, _OPTIMIZER = "model.", "optimizer."


class Fsdp2Backend:
    """`Backend` of FSDP2: all ranks share out every weight, and each computes the whole model on its own samples."""

    returns_results = True
    has_logits = True
    expert_parallel_size = 1

    def __init__(self, role: ModelRole, process: ProcessInfo, *, trains: bool) -> None:
        """As `BackendClass`."""
        settings = role.section.strategy_args.strategy_config
        assert isinstance(settings, Fsdp2Config), "the registry gives each strategy its own settings"
        self._role = role
        self._settings = settings
        self._process = process
        self._trains = trains
        self._tokens = Layout(
            packed=role.section.use_sequence_packing, multiple=role.section.sequence_length_round, batch_outer=True
        )

    @property
    def data_parallel_rank(self) -> int:
        return self._process.rank

    @property
    def data_parallel_size(self) -> int:
        return self._process.world_size

    def prepare_thread(self) -> None:
        pass

    def initialize(self, facts: ModelFacts) -> None:
        self.device = world.join(self._process)
        self.model = build_model(
            self._role.checkpoint,
            self._role.section.model_args,
            self._settings,
            self.device,
            trains=self._trains,
            fp32_lm_head=self._role.fp32_lm_head,
        )
        self.data_parallel = DataParallel(self._process.rank, self._process.world_size, self.device)

    def make_optimizer(self, learning: Learning) -> None:
        self.optimizer = Optimizer(self.model.module, learning.args, total_steps=learning.total_optimizer_steps)

    @property
    def cut_rules(self) -> CutRules:
        return CutRules(self._tokens, always_in_step=True)

    @property
    def routers(self) -> list[list[HookedRouter]]:
        return [self.model.routers]

    def run(
        self,
        micro_batches: Sequence[MicroBatch],
        objective: Objective,
        session: RoutingSession[Any] | None,
        *,
        forward_only: bool,
        observers: Sequence[Observer] = (),
    ) -> list[TokenValues]:
        return run_micro_batches(
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
            logits_BSV, labels_BS, kept, temperature=temperature, entropy_gradient=entropy_gradient
        )

    def sum_over_context_ranks(self, values: torch.Tensor) -> None:
        """As `Backend.sum_over_context_ranks`; no other rank shares this one's samples."""

    def reduced(self, stats: TokenStats) -> dict[str, float]:
        return stats.reduce(self.data_parallel.reduce)

    def pieces(self, tensor: torch.Tensor) -> list[tuple[Layout, torch.Tensor]]:
        """As `Backend.pieces`; no other rank shares this one's samples."""
        return [(self._tokens, tensor)]

    def step_observers(self) -> list[StepObserver]:
        return []

    def audit(
        self, num_micro_batches: int, *, layer_rows: Mapping[int, int], top_k: int, read: ReadRoutes
    ) -> ExpertsAudit:
        return ExpertsAudit(self.model, num_micro_batches, layer_rows=layer_rows, top_k=top_k, read=read)

    def export_weights(self) -> Iterator[tuple[str, torch.Tensor]]:
        """As `Backend.export_weights`; every rank gets the tensors."""
        return self.model.export_weights()

    def load_weights(self, path: Path) -> None:
        checkpoint.load([_named(_MODEL, self.model.state())], path, within=_MODEL)

    def state(self) -> checkpoint.State:
        """Return this rank's memory of everything in a checkpoint."""
        return _named(_MODEL, self.model.state()) | _named(_OPTIMIZER, self.optimizer.state())

    def snapshot(self) -> Snapshot:
        return checkpoint.Snapshot({name: checkpoint.host_copy(tensor) for name, tensor in self.state().items()})

    def load_checkpoint(self, path: Path) -> None:
        state = self.state()
        checkpoint.load([state], path)
        self.optimizer.resume(int(state["optimizer.done"]))

    def close(self) -> None:
        self.model.release()
        del self.model
        world.leave()


def _named(prefix: str, state: checkpoint.State) -> checkpoint.State:
    return {f"{prefix}{name}": tensor for name, tensor in state.items()}
