"""Megatron's optimizer and learning-rate schedule, and one guarded step of them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from megatron.core.optimizer import MegatronOptimizer, OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from roll_r3.config.workers import TrainingArgs
from roll_r3.strategies.train.update import StepFigures, check_finite


class Optimizer:
    """Adam over a model's chunks; with bf16 weights it keeps fp32 masters."""

    def __init__(
        self,
        chunks: Sequence[torch.nn.Module],
        args: TrainingArgs,
        *,
        dtype: torch.dtype,
        distributed: bool,
        total_steps: int,
    ) -> None:
        """
        Args:
            chunks: in megatron's data-parallel wrappers, their weights loaded.
            distributed: shard state and masters over data-parallel ranks.
            total_steps: optimizer steps of the whole run, over which the learning rate decays.
        """
        self._chunks = list(chunks)
        config = OptimizerConfig(
            optimizer="adam",
            lr=args.learning_rate,
            min_lr=0.0,
            weight_decay=args.weight_decay,
            adam_beta1=args.adam_beta1,
            adam_beta2=args.adam_beta2,
            adam_eps=args.adam_epsilon,
            clip_grad=args.max_grad_norm,
            bf16=dtype is torch.bfloat16,
            params_dtype=dtype,
            use_distributed_optimizer=distributed,
        )
        self._optimizer: MegatronOptimizer = get_megatron_optimizer(config, self._chunks)
        self._scheduler = OptimizerParamScheduler(
            self._optimizer,
            init_lr=0.0,
            max_lr=args.learning_rate,
            min_lr=0.0,
            lr_warmup_steps=args.warmup_steps,
            lr_decay_steps=total_steps,
            lr_decay_style=args.lr_scheduler_type,
            start_wd=args.weight_decay,
            end_wd=args.weight_decay,
            wd_incr_steps=0,
            wd_incr_style="constant",
        )

    def zero_grad(self) -> None:
        for chunk in self._chunks:
            chunk.zero_grad_buffer()
        self._optimizer.zero_grad()

    def step(self) -> StepFigures:
        """Clip, update, and move the learning rate on; collective.

        Raises:
            RollError: the gradient norm is not finite. The optimizer changed nothing; an expert bias that moves has
                moved with the end of the schedule.
        """
        self._optimizer.prepare_grads()
        norm = float(self._optimizer.get_grad_norm())
        check_finite(norm)
        learning_rate = float(self._optimizer.param_groups[0]["lr"])
        self._optimizer.step()
        self._scheduler.step(increment=1)
        return StepFigures(norm, learning_rate)
