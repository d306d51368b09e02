"""The learning rate of each optimizer step: warm-up, then a decay to 0 at the end of the run."""

from __future__ import annotations

import math

from roll_r3.config.workers import TrainingArgs


def learning_rate(args: TrainingArgs, done: int, total: int) -> float:
    """Of the step that follows `done` of the run's `total` optimizer steps."""
    warmup, peak = args.warmup_steps, args.learning_rate
    if warmup and done <= warmup:
        return peak * done / warmup
    if args.lr_scheduler_type == "constant":
        return peak
    if done > total:
        return 0.0
    progress = (done - warmup) / (total - warmup)
    return peak * (1 - progress if args.lr_scheduler_type == "linear" else (1 + math.cos(math.pi * progress)) / 2)


def decay_steps(args: TrainingArgs, total: int) -> int:
    """Optimizer steps at which megatron's decay is to end: the run's, or later where all of them warm up.

    Its scheduler refuses a decay that ends before the warm-up does; such a run never comes to it.
    """
    return max(total, args.warmup_steps + 1)
