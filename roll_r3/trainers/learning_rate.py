"""The learning rate of each optimizer step: warm-up, then a decay to a floor at the end of the run."""

from __future__ import annotations

import math

from roll_r3.config.workers import TrainingArgs


def learning_rate(args: TrainingArgs, done: int, total: int) -> float:
    """Learning rate of the step after `done` of the run's `total` optimizer steps. See `TrainingArgs.warmup_steps`."""
    warmup, peak = args.warmup_steps, args.learning_rate
    if done < warmup:
        return peak * (done + 1) / warmup
    if args.lr_scheduler_type == "constant":
        return peak
    if done > total:
        return args.min_lr
    progress = (done - warmup) / (total - warmup)
    left = 1 - progress if args.lr_scheduler_type == "linear" else (1 + math.cos(math.pi * progress)) / 2
    return args.min_lr + (peak - args.min_lr) * left
