"""Parts of a training step around its optimizer steps: mini-batches, denominators, figures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import astuple, dataclass, fields

import numpy as np
import torch
import torch.distributed as dist

from roll_r3.algorithms.aggregation import loss_denominator
from roll_r3.batch.batch import Batch
from roll_r3.batch.data_parallel import DataParallel
from roll_r3.batch.grouping import shuffled_mini_batches
from roll_r3.config.model_role import Learning
from roll_r3.errors import ReplayError, RollError
from roll_r3.models.facts import ModelFacts
from roll_r3.replay.choice_counts import LayerLoads, at_model_layers
from roll_r3.replay.counts import ReplayCounts
from roll_r3.replay.expert_load import ExpertLoad


@dataclass(frozen=True)
class StepFigures:
    """Figures of one optimizer step."""

    grad_norm: float
    """Global norm before clipping."""
    learning_rate: float


def mini_batches(learning: Learning, batch: Batch, *, seed: int, step: int, dp_rank: int) -> list[Batch]:
    """Return this shard's samples of each optimizer step of training step `step`.

    Args:
        seed: seed of the run.
    """
    size = learning.args.per_device_train_batch_size * learning.args.gradient_accumulation_steps
    return [
        batch.select(samples)
        for epoch in range(learning.ppo_epochs)
        for samples in shuffled_mini_batches(batch.num_samples, size, (seed, step, epoch, dp_rank))
    ]


def is_on_policy(batch: Batch, parts: Sequence[Batch]) -> bool:
    """Return True where the weights at the start of the update are the old policy, so no earlier pass is needed.

    Such an update has one optimizer step, on the samples of the batch in its order.

    Raises:
        RollError: several optimizer steps, and a batch without old log-probabilities.
    """
    if batch.old_log_probs_N is None and len(parts) > 1:
        raise RollError(
            f"a batch without old log-probabilities came to {len(parts)} optimizer steps, of which all but the first "
            "need them"
        )
    return batch.old_log_probs_N is None


def denominators(parts: Sequence[Batch], mode: str, data_parallel: DataParallel) -> list[float]:
    """Return the loss denominator of each optimizer step over all data-parallel ranks; collective over them.

    It is 0 where no rank has a token to train on.
    """
    total = torch.tensor(
        [loss_denominator(part, mode) for part in parts], dtype=torch.float64, device=data_parallel.device
    )
    data_parallel.reduce(total)
    found: list[float] = total.tolist()
    return found


def step_metrics(figures: Sequence[StepFigures], skipped: Sequence[str]) -> dict[str, float]:
    """Return a training step's metrics of its optimizer steps.

    Args:
        figures: one entry for each completed optimizer step.
        skipped: one entry for each skipped one.
    """
    counts = {"actor_train/optimizer_steps": float(len(figures)), "actor_train/skipped_steps": float(len(skipped))}
    if not figures:
        return counts
    return counts | {
        "actor_train/grad_norm": float(np.mean([f.grad_norm for f in figures])),
        "actor/lr": figures[-1].learning_rate,
    }


def check_routes(batch: Batch, role: str, mode: str) -> None:
    """Raise ReplayError when the batch carries no routes for `role` to replay."""
    if batch.routes is None:
        raise ReplayError(
            f"{role}.router_replay.mode is {mode}, but the batch carries no routes: the rollout has to record them "
            "(actor_infer.router_replay.mode: R3)"
        )


def summed_counts(counts: Sequence[ReplayCounts], device: torch.device) -> ReplayCounts:
    """Return the sum of this rank's counts over all ranks of the world; collective."""
    total = torch.tensor([astuple(c) for c in counts], device=device).sum(0)
    dist.all_reduce(total)
    return ReplayCounts(**dict(zip((f.name for f in fields(ReplayCounts)), total.tolist(), strict=True)))


def summed_load(loads: Sequence[LayerLoads], facts: ModelFacts, device: torch.device) -> ExpertLoad:
    """Return the sum of this rank's loads over all ranks of the world; collective."""
    total_2ME = at_model_layers(loads, facts.moe_layers, facts.num_experts, device)
    dist.all_reduce(total_2ME)
    return ExpertLoad(tuple(facts.moe_layers), total_2ME.cpu().numpy())
