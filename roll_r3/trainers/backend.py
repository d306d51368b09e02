"""Contract between a policy and the library under its model.

A backend is one rank's part of a model. `roll_r3.trainers.policy` holds the order of a step, and calls a backend where
libraries differ. Shape legend: n samples, N inputs of a shard, B x S tokens of this rank, V vocabulary.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch

from roll_r3.algorithms.stats import TokenStats
from roll_r3.batch.data_parallel import DataParallel
from roll_r3.batch.micro_batch import KeptSlots, MicroBatch
from roll_r3.batch.route_pieces import ReadRoutes
from roll_r3.batch.token_map import Layout
from roll_r3.config.model_role import Learning, ModelRole
from roll_r3.models.facts import ModelFacts
from roll_r3.replay.audit import Audit
from roll_r3.replay.layer import Router
from roll_r3.replay.observer import Observer
from roll_r3.replay.session import RoutingSession
from roll_r3.strategies.base import ProcessInfo, Snapshot
from roll_r3.trainers.cutting import CutRules
from roll_r3.trainers.objective import Objective, TokenValues
from roll_r3.trainers.update import StepFigures


class Optimizer(Protocol):
    """Adam over the weights of this rank."""

    def zero_grad(self) -> None:
        """Clear all gradients."""

    def grad_norm(self) -> float:
        """Return the norm of all gradients before clipping; collective. No later step depends on this call."""

    def step(self, norm: float) -> StepFigures:
        """Clip, update, and advance the learning rate; collective.

        Args:
            norm: result of `grad_norm`, finite.
        """


class StepObserver(Observer):
    """Observer of one optimizer step, with an effect on the model's state at the end of the schedule."""

    @abstractmethod
    def rewind(self) -> None:
        """Undo the effect, because the optimizer step is skipped."""


class Backend(Protocol):
    """One rank of a model. Members below `initialize` may be used only after it."""

    @property
    def data_parallel_rank(self) -> int: ...

    @property
    def data_parallel_size(self) -> int: ...

    @property
    def returns_results(self) -> bool:
        """True on exactly one rank of each data-parallel shard."""

    def prepare_thread(self) -> None:
        """Prepare the calling thread for the library. Cheap to repeat."""

    def initialize(self, facts: ModelFacts) -> None:
        """Join the process group, build the model, load the weights; collective.

        Args:
            facts: facts about the checkpoint.

        Raises:
            ConfigError: the checkpoint cannot be built here, or another role of this process has another layout.
        """

    def make_optimizer(self, learning: Learning) -> None:
        """Make `optimizer`; collective. A frozen model has none."""

    @property
    def device(self) -> torch.device: ...

    @property
    def data_parallel(self) -> DataParallel:
        """Ranks with the same layers and other samples."""

    @property
    def cut_rules(self) -> CutRules:
        """Demands on the micro-batches of a pass."""

    @property
    def expert_parallel_size(self) -> int:
        """Number of ranks over which a layer's experts are spread."""

    @property
    def routers(self) -> Sequence[Sequence[Router]]:
        """Routers of each chunk of this rank, in layer order."""

    @property
    def optimizer(self) -> Optimizer: ...

    def run(
        self,
        micro_batches: Sequence[MicroBatch],
        objective: Objective,
        session: RoutingSession[Any] | None,
        *,
        forward_only: bool,
        observers: Sequence[Observer] = (),
    ) -> list[TokenValues]:
        """Run every micro-batch through the model, and back unless `forward_only`; collective.

        Args:
            micro_batches: cut by `cut_rules`.
            session: routes these micro-batches; None: routers choose by themselves.
            observers: watch every forward and backward, in this order.

        Returns:
            The objective's values of each micro-batch, on ranks with logits; nothing elsewhere.
        """

    def token_values(
        self,
        logits_BSV: torch.Tensor,
        labels_BS: torch.Tensor,
        kept: KeptSlots | None,
        *,
        temperature: float,
        entropy_gradient: bool,
    ) -> TokenValues:
        """Return log-probabilities of the labels and entropies under the temperature; fp32 [B, S] each, in nats.

        Args:
            kept: sets of tokens over which both are taken, the labels inside; None: the whole vocabulary.
            entropy_gradient: make the entropy differentiable, as the log-probabilities are.
        """

    @property
    def has_logits(self) -> bool:
        """True on ranks where `run` returns values: the last pipeline stage."""

    def sum_over_context_ranks(self, values: torch.Tensor) -> None:
        """Add up a tensor, in place, over the ranks with parts of the same sequences; collective over these ranks.

        Only ranks with logits call it, all in the same order: a loss within `run` may.
        """

    def reduced(self, stats: TokenStats) -> dict[str, float]:
        """Return the token statistics over all ranks, the same on every rank; collective."""

    def pieces(self, tensor: torch.Tensor) -> list[tuple[Layout, torch.Tensor]]:
        """Return (layout, tensor) of every rank with a share of this rank's sequences; collective over them."""

    def step_observers(self) -> Sequence[StepObserver]:
        """Return the observers of one optimizer step besides an audit."""

    def audit(self, num_micro_batches: int, *, layer_rows: Mapping[int, int], top_k: int, read: ReadRoutes) -> Audit:
        """Return an audit of one optimizer step; arguments as of `Audit`."""

    def export_weights(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield (Hugging Face name, whole tensor) pairs, all of them on the first rank at least; collective.

        Weights have the training dtype, an expert bias is fp32.
        """

    def load_weights(self, path: Path) -> None:
        """As `InferStrategy.load_weights`."""

    def snapshot(self) -> Snapshot:
        """As `TrainStrategy.snapshot`."""

    def load_checkpoint(self, path: Path) -> None:
        """As `TrainStrategy.load_checkpoint`."""

    def close(self) -> None:
        """Release the model and leave the process group."""


class BackendClass(Protocol):
    """Maker of a `Backend`. It loads nothing."""

    def __call__(self, role: ModelRole, process: ProcessInfo, *, trains: bool) -> Backend:
        """
        Args:
            process: this rank's place in the world.
            trains: the model gets gradients, and may get an optimizer.

        Raises:
            ConfigError: conflicting settings.
        """
