"""Skipped optimizer steps: those with a gradient or loss that is not finite."""

from __future__ import annotations

import logging
import math

import torch
import torch.distributed as dist

from roll_r3.errors import RollError

logger = logging.getLogger(__name__)


class LossSum:
    """This rank's part of the loss of one optimizer step; it stays on its device until it is read."""

    def __init__(self) -> None:
        self._sum: torch.Tensor | None = None

    def add(self, loss: torch.Tensor) -> None:
        """Add the loss of one micro-batch, a scalar."""
        self._sum = loss.detach() if self._sum is None else self._sum + loss.detach()

    def is_finite(self) -> bool:
        """Return True also where this rank has no loss, as on all pipeline stages but the last."""
        return self._sum is None or bool(torch.isfinite(self._sum))


class FiniteSteps:
    """Decision, the same on all ranks, to make or skip an optimizer step, and the limit on skipped ones."""

    def __init__(self, max_skipped: int, device: torch.device) -> None:
        """
        Args:
            max_skipped: largest number of skipped optimizer steps in a row.
        """
        self._max_skipped = max_skipped
        self._device = device
        self._in_a_row: list[str] = []

    def non_finite(self, grad_norm: float, loss: LossSum) -> str:
        """Return why the step must be skipped; empty where it is to be made. Collective, world-wide.

        A loss can be NaN while every gradient is finite. Where a log-probability of the old policy or of the
        reference is NaN, the clamp of the log ratio passes no gradient.

        Args:
            grad_norm: norm before clipping, over all parameters in this rank's norm.
            loss: this rank's part.
        """
        flags = torch.tensor([not math.isfinite(grad_norm), not loss.is_finite()], device=self._device).int()
        dist.all_reduce(flags, dist.ReduceOp.MAX)
        in_gradient, in_loss = flags.tolist()
        if in_gradient:
            return f"the gradient norm is {grad_norm}" if not math.isfinite(grad_norm) else "a gradient is not finite"
        return f"the loss is not finite (the gradient norm is {grad_norm:g})" if in_loss else ""

    def made(self) -> None:
        """Note a completed optimizer step."""
        self._in_a_row = []

    def skipped(self, step: int, number: int, reason: str) -> str:
        """Note and log a skipped optimizer step; return the text for the run's log.

        Args:
            step: training step.
            number: optimizer step in it, counted from 1.
            reason: result of `non_finite`.

        Raises:
            RollError: one more in a row than allowed.
        """
        text = f"step {step}: {reason}: optimizer step {number} was skipped"
        self._in_a_row.append(text)
        logger.warning("%s (%d in a row)", text, len(self._in_a_row))
        if len(self._in_a_row) > self._max_skipped:
            before = self._in_a_row[:-1][-_SHOWN:]
            earlier = f" Before it, without one that was made in between: {'; '.join(before)}." if before else ""
            raise RollError(
                f"{reason}: the optimizer did not step (step {step}, optimizer step {number}), which makes "
                f"{len(self._in_a_row)} in a row where max_skipped_steps allows {self._max_skipped}.{earlier} Look for "
                "extreme ratios or log-probabilities in the metrics; a lower learning_rate or clip range is the usual "
                "cure"
            )
        return text


_SHOWN = 5
"""Number of earlier skipped steps named in the error."""
