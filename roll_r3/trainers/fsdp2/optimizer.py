"""Adam over this rank's parts of the weights, and one guarded step of it."""

from __future__ import annotations

import torch
from torch.distributed.tensor import DTensor
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from roll_r3.config.workers import TrainingArgs
from roll_r3.trainers.learning_rate import learning_rate
from roll_r3.trainers.update import StepFigures


class Optimizer:
    """The same steps as megatron's: decoupled weight decay, except for norms and biases."""

    def __init__(self, module: torch.nn.Module, args: TrainingArgs, *, total_steps: int) -> None:
        """
        Args:
            total_steps: number of optimizer steps of the whole run, for the decay of the learning rate.
        """
        self._args = args
        self._total_steps = total_steps
        self._done = 0
        self._names = {parameter: name for name, parameter in module.named_parameters()}
        self._parameters = list(module.parameters())
        vectors = [p for p in self._parameters if p.ndim == 1]
        matrices = [p for p in self._parameters if p.ndim != 1]
        self._optimizer = torch.optim.AdamW(
            [{"params": matrices, "weight_decay": args.weight_decay}, {"params": vectors, "weight_decay": 0.0}],
            lr=args.learning_rate,
            betas=(args.adam_beta1, args.adam_beta2),
            eps=args.adam_epsilon,
            foreach=False,
            fused=self._parameters[0].device.type == "cuda",
        )

    def zero_grad(self) -> None:
        self._optimizer.zero_grad()

    def grad_norm(self) -> float:
        """Global norm of the gradients before clipping; collective."""
        total = get_total_norm([p.grad for p in self._parameters if p.grad is not None])
        return float(total.full_tensor() if isinstance(total, DTensor) else total)

    def step(self, norm: float) -> StepFigures:
        """Clip, update, and advance the learning rate; collective.

        Args:
            norm: finite result of `grad_norm`.
        """
        if self._args.max_grad_norm:
            clip_grads_with_norm_(
                self._parameters, self._args.max_grad_norm, torch.tensor(norm, device=self._parameters[0].device)
            )
        rate = learning_rate(self._args, self._done, self._total_steps)
        for group in self._optimizer.param_groups:
            group["lr"] = rate
        self._optimizer.step()
        self._done += 1
        return StepFigures(norm, rate)

    def state(self) -> dict[str, torch.Tensor]:
        """The optimizer's state by name, in its own memory where possible.

        `done` int64 [1]: number of steps taken; it decides Adam's bias correction and the learning rate.
        `NAME.exp_avg`, `NAME.exp_avg_sq`: Adam's moments of each parameter, sharded like the parameter.
        """
        moments: dict[str, torch.Tensor] = {}
        for parameter, name in self._names.items():
            kept = self._optimizer.state[parameter]
            if not kept:  # Adam's own initial values
                step = torch.tensor(0.0, device=parameter.device if self._optimizer.defaults["fused"] else None)
                kept |= {
                    "step": step,
                    "exp_avg": torch.zeros_like(parameter),
                    "exp_avg_sq": torch.zeros_like(parameter),
                }
            moments |= {f"{name}.{moment}": kept[moment] for moment in ("exp_avg", "exp_avg_sq")}
        return {**moments, "done": torch.tensor([self._done])}

    def resume(self, done: int) -> None:
        """Resume after `done` steps with the moments written into `state`."""
        self._done = done
        for parameter in self._parameters:
            self._optimizer.state[parameter]["step"].fill_(done)
