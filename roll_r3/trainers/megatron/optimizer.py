"""Megatron's optimizer, and one guarded step of it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import ChainedOptimizer, MegatronOptimizer, OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer.optimizer import Float16OptimizerWithFloat16Params

from roll_r3.config.workers import TrainingArgs
from roll_r3.trainers.learning_rate import learning_rate
from roll_r3.trainers.update import StepFigures

MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True, eq=False)
class Slot:
    """An optimizer's state of one parameter on this rank: all elements, or a slice."""

    parameter: torch.nn.Parameter
    """The model's parameter."""
    main: torch.Tensor | None
    """fp32 weights stepped by Adam: the parameter itself, its master copy, or a slice [size] of either. None: this
    rank has no element of the parameter."""
    state: dict[str, Any]
    """Adam's state of `main`."""
    begin: int = 0
    """First element of the slice in the flat parameter."""
    group: dist.ProcessGroup | None = None
    """Group of the ranks with the slices; None: this rank has the whole state."""

    @property
    def size(self) -> int:
        return 0 if self.main is None else self.main.numel()

    @property
    def holds_some(self) -> bool:
        return self.main is not None

    @property
    def steps_on_parameter(self) -> bool:
        """True if `main` is the model's own memory, not a copy."""
        return self.parameter.dtype is torch.float32

    def kept(self, kind: str) -> torch.Tensor:
        """`main`, or one of `MOMENTS` in its shape."""
        assert self.main is not None
        return self.state[kind] if kind in MOMENTS else self.main


class Optimizer:
    """Adam over a model's chunks; with bf16 weights it keeps fp32 masters."""

    def __init__(
        self,
        chunks: Sequence[DistributedDataParallel],
        args: TrainingArgs,
        *,
        dtype: torch.dtype,
        distributed: bool,
        total_steps: int,
    ) -> None:
        """
        Args:
            chunks: chunks in megatron's data-parallel wrappers, with loaded weights.
            distributed: shard state and masters over data-parallel ranks.
            total_steps: number of optimizer steps of the whole run, for the decay of the learning rate.
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
        self._args = args
        self._total_steps = total_steps
        self._done = 0
        for group in self._optimizer.param_groups:  # 0 for norms and biases; megatron leaves this to its scheduler
            group["weight_decay"] = args.weight_decay * group["wd_mult"]

    def zero_grad(self) -> None:
        for chunk in self._chunks:
            chunk.zero_grad_buffer()
        self._optimizer.zero_grad()

    def grad_norm(self) -> float:
        """Global norm of the gradients before clipping; collective. It does not affect the step."""
        self._optimizer.prepare_grads()
        return float(self._optimizer.get_grad_norm())

    def step(self, norm: float) -> StepFigures:
        """Clip, update, and advance the learning rate; collective.

        Args:
            norm: finite result of `grad_norm`.
        """
        rate = learning_rate(self._args, self._done, self._total_steps)
        for group in self._optimizer.param_groups:
            group["lr"] = rate
        self._optimizer.step()
        self._done += 1
        return StepFigures(norm, rate)

    @property
    def done(self) -> int:
        """Number of steps taken."""
        return self._done

    def slots(self) -> list[Slot]:
        """State of every parameter of this rank, in the same order on all ranks sharding it.

        Adam's state is created for parameters without one.
        """
        return [slot for part in self._parts() for slot in _slots(part)]

    def resume(self, done: int) -> None:
        """Resume after `done` steps with the state written into the memory of `slots`."""
        for part in self._parts():
            adam = part.optimizer
            for group in adam.param_groups:
                if not _counts_per_parameter(adam):
                    group["step"] = done
                    continue
                for parameter in group["params"]:
                    adam.state[parameter]["step"].fill_(float(done))
        self._done = done

    def _parts(self) -> list[Any]:
        """Megatron's optimizers with parameters on this rank."""
        whole = self._optimizer
        parts = whole.chained_optimizers if isinstance(whole, ChainedOptimizer) else [whole]
        return [part for part in parts if part.optimizer is not None]


def _slots(part: Any) -> Iterator[Slot]:
    """Slots of one of megatron's optimizers."""
    adam = part.optimizer
    if isinstance(part, DistributedOptimizer):
        for parameter in (parameter for buffer in part.buffers for parameter in buffer.param_index_map):
            if parameter not in part.model_param_gbuf_map:
                yield Slot(parameter, None, {}, group=part.data_parallel_group)
                continue
            group, index = part.model_param_group_index_map[parameter]
            main = adam.param_groups[group]["params"][index]
            begin = part._get_model_param_range_map(parameter)["param"].start
            yield Slot(parameter, main, _memory(adam, main), begin, part.data_parallel_group)
        return
    copies = {}
    if isinstance(part, Float16OptimizerWithFloat16Params):
        groups = zip(part.float16_groups, part.fp32_from_float16_groups, strict=True)
        copies = {id(copy): own for owns, made in groups for own, copy in zip(owns, made, strict=True)}
    for main in (parameter for group in adam.param_groups for parameter in group["params"]):
        yield Slot(copies.get(id(main), main), main, _memory(adam, main))


def _memory(adam: Any, main: torch.Tensor) -> dict[str, Any]:
    """Adam's state of a parameter; created with Adam's initial values if there is none."""
    kept: dict[str, Any] = adam.state[main]
    if not kept:
        kept |= {moment: torch.zeros_like(main) for moment in MOMENTS}
        if _counts_per_parameter(adam):
            kept["step"] = torch.tensor(0.0)
    return kept


def _counts_per_parameter(adam: Any) -> bool:
    """True for PyTorch's Adam, which counts steps per parameter; TransformerEngine's and Apex's count per group."""
    return isinstance(adam, torch.optim.Adam)
