"""Optimizer steps that are not made, because a figure of theirs is not finite."""

from __future__ import annotations

import logging
import math

import torch
import torch.distributed as dist

from roll_r3.errors import RollError

logger = logging.getLogger(__name__)


class LossSum:
    """The loss of one optimizer step, as far as it arises on this rank; it stays on its device until it is read."""

    def __init__(self) -> None:
        self._sum: torch.Tensor | None = None

    def add(self, loss: torch.Tensor) -> None:
        """Of one micro-batch; a scalar."""
        self._sum = loss.detach() if self._sum is None else self._sum + loss.detach()

    def is_finite(self) -> bool:
        """True where this rank has none, as on all pipeline stages but the last."""
        return self._sum is None or bool(torch.isfinite(self._sum))


class FiniteSteps:
    """Decides, alike on all ranks, which optimizer steps are made, and how long that may go on."""

    def __init__(self, max_skipped: int, device: torch.device) -> None:
        """
        Args:
            max_skipped: optimizer steps in a row that may be left out.
        """
        self._max_skipped = max_skipped
        self._device = device
        self._in_a_row: list[str] = []

    def what_is_wrong(self, grad_norm: float, loss: LossSum) -> str:
        """Which figures are not finite, on whatever rank; empty where the step is to be made. Collective, world-wide.

        A loss may be NaN although no gradient is: where a log-probability of the policy before the update or of the
        reference is NaN, the clamp of the log ratio leaves no gradient.

        Args:
            grad_norm: before clipping, over all that this rank's norm is of.
            loss: before it is known which ranks have one.
        """
        flags = torch.tensor([not math.isfinite(grad_norm), not loss.is_finite()], device=self._device).int()
        dist.all_reduce(flags, dist.ReduceOp.MAX)
        in_gradient, in_loss = flags.tolist()
        if in_gradient:
            return f"the gradient norm is {grad_norm}" if not math.isfinite(grad_norm) else "a gradient is not finite"
        return f"the loss is not finite (the gradient norm is {grad_norm:g})" if in_loss else ""

    def made(self) -> None:
        """An optimizer step was made."""
        self._in_a_row = []

    def skipped(self, step: int, number: int, why: str) -> str:
        """One was not; what to tell of it.

        Args:
            step: the training step.
            number: of the optimizer step in it, counted from 1.
            why: as `what_is_wrong` said.

        Raises:
            RollError: it is one more in a row than allowed.
        """
        text = f"step {step}: {why}: optimizer step {number} was left out"
        self._in_a_row.append(text)
        logger.warning("%s (%d in a row)", text, len(self._in_a_row))
        if len(self._in_a_row) > self._max_skipped:
            before = self._in_a_row[:-1][-_SHOWN:]
            earlier = f" Before it, without one that was made in between: {'; '.join(before)}." if before else ""
            raise RollError(
                f"{why}: the optimizer did not step (step {step}, optimizer step {number}), which makes "
                f"{len(self._in_a_row)} in a row where max_skipped_steps allows {self._max_skipped}.{earlier} Look for "
                "extreme ratios or log-probabilities in the metrics; a lower learning_rate or clip range is the usual "
                "cure"
            )
        return text


_SHOWN = 5
"""Of the steps that were left out before, so many are named."""
