"""What every trainer does around its optimizer steps: mini-batches, denominators, figures."""

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
from roll_r3.config.derived import mini_batch_size
from roll_r3.config.pipeline import RLVRConfig
from roll_r3.errors import ReplayError, RollError
from roll_r3.replay.counts import ReplayCounts


@dataclass(frozen=True)
class StepFigures:
    """Of one optimizer step."""

    grad_norm: float
    """Global norm before clipping."""
    learning_rate: float


def total_optimizer_steps(config: RLVRConfig) -> int:
    """Of the whole run, over which the learning rate decays."""
    return config.max_steps * config.ppo_epochs * (config.samples_per_step // mini_batch_size(config))


def mini_batches(config: RLVRConfig, batch: Batch, step: int, dp_rank: int) -> list[Batch]:
    """Samples of each optimizer step of training step `step`, of this shard."""
    args = config.actor_train.training_args
    size = args.per_device_train_batch_size * args.gradient_accumulation_steps
    return [
        batch.select(samples)
        for epoch in range(config.ppo_epochs)
        for samples in shuffled_mini_batches(batch.num_samples, size, (config.seed, step, epoch, dp_rank))
    ]


def is_on_policy(batch: Batch, parts: Sequence[Batch]) -> bool:
    """True where the weights that the update begins with are the old policy, so that no pass before it is needed.

    That takes one optimizer step. Its samples are those of the batch, in the batch's order.

    Raises:
        RollError: the batch brings no old log-probabilities to several optimizer steps.
    """
    if batch.old_log_probs_N is None and len(parts) > 1:
        raise RollError(
            f"a batch without old log-probabilities came to {len(parts)} optimizer steps, of which all but the first "
            "need them"
        )
    return batch.old_log_probs_N is None


def denominators(parts: Sequence[Batch], mode: str, data_parallel: DataParallel) -> list[float]:
    """Of each optimizer step's loss, over all data-parallel ranks; collective over them."""
    total = torch.tensor(
        [loss_denominator(part, mode) for part in parts], dtype=torch.float64, device=data_parallel.device
    )
    data_parallel.reduce(total)
    return [max(value, 1.0) for value in total.tolist()]


def step_metrics(figures: Sequence[StepFigures], skipped: Sequence[str]) -> dict[str, float]:
    """What a training step reports of its optimizer steps: of those that were made, and how many were not."""
    counts = {"actor_train/optimizer_steps": float(len(figures)), "actor_train/skipped_steps": float(len(skipped))}
    if not figures:
        return counts
    return counts | {
        "actor_train/grad_norm": float(np.mean([f.grad_norm for f in figures])),
        "actor/lr": figures[-1].learning_rate,
    }


def check_routes(batch: Batch, role: str, mode: str) -> None:
    """Raises ReplayError: the batch that `role` is to replay carries no routes."""
    if batch.routes is None:
        raise ReplayError(
            f"{role}.router_replay.mode is {mode}, but the batch carries no routes: the rollout has to record them "
            "(actor_infer.router_replay.mode: R3)"
        )


def summed_counts(counts: Sequence[ReplayCounts], device: torch.device) -> ReplayCounts:
    """Sum of this rank's counts over all ranks of the world; collective."""
    total = torch.tensor([astuple(c) for c in counts], device=device).sum(0)
    dist.all_reduce(total)
    return ReplayCounts(**dict(zip((f.name for f in fields(ReplayCounts)), total.tolist(), strict=True)))
