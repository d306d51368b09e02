"""Log-probabilities and entropies over the tokens kept by truncated sampling, for every backend.

The policy under truncation is the softmax over the kept logits: log p = z_label - log sum(exp z) over the set, and
H = log Z - sum(p * z). Only these logits are read; no mask of tokens x vocabulary exists. Shape legend: B x S tokens of
this rank, N = B * S, V vocabulary columns of this rank, J kept ids among its columns.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from roll_r3.batch.micro_batch import KeptSlots


@dataclass(frozen=True)
class VocabularyPart:
    """Columns of this rank, where ranks share out the vocabulary."""

    first: int
    """Token id of the first column."""
    reduce: Callable[[torch.Tensor, str], None]
    """Reduce a tensor in place over all parts, by "sum" or "max"."""


def kept_log_probs_and_entropy(
    logits_BSV: torch.Tensor,
    labels_BS: torch.Tensor,
    kept: KeptSlots,
    *,
    temperature: float,
    entropy_gradient: bool,
    part: VocabularyPart | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probability of each label, and entropy, over the label's set under the sampling temperature, in nats.

    Args:
        kept: sets with their labels inside.
        entropy_gradient: True makes the entropy differentiable, like the log-probabilities.
        part: this rank's columns; None: all.

    Returns:
        fp32 [B, S] each, the same for every part of the vocabulary; 0 for a token without a set.
    """
    slots_J, columns_J = kept.slots_J, kept.ids_J
    is_label_J = columns_J == labels_BS.reshape(-1)[slots_J]
    if part is not None:
        columns_J = columns_J - part.first
        here_J = (columns_J >= 0) & (columns_J < logits_BSV.size(-1))
        slots_J, columns_J, is_label_J = slots_J[here_J], columns_J[here_J], is_label_J[here_J]
    log_probs_N, entropy_N = _KeptValues.apply(  # type: ignore[no-untyped-call]
        logits_BSV, slots_J, columns_J, is_label_J, kept.sizes_BS.reshape(-1) > 0, temperature, part
    )
    entropy_BS = entropy_N.view(labels_BS.shape)
    return log_probs_N.view(labels_BS.shape), entropy_BS if entropy_gradient else entropy_BS.detach()


class _KeptValues(torch.autograd.Function):
    """Values of each token, with d log p / dz = [label] - p and dH/dz = -p * (log p + H)."""

    @staticmethod
    def forward(
        ctx: Any,
        logits_BSV: torch.Tensor,
        slots_J: torch.Tensor,
        columns_J: torch.Tensor,
        is_label_J: torch.Tensor,
        has_set_N: torch.Tensor,
        temperature: float,
        part: VocabularyPart | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        rows_J, places_J = slots_J // logits_BSV.size(1), slots_J % logits_BSV.size(1)
        # fp64 costs little for so few, and makes the fp32 results independent of the order of atomic additions
        z_J = (logits_BSV[rows_J, places_J, columns_J].float() / temperature).double()
        peak_N = z_J.new_full(has_set_N.shape, -torch.inf).scatter_reduce(0, slots_J, z_J, "amax")
        if part is not None:
            part.reduce(peak_N, "max")
        shifted_J = z_J - peak_N[slots_J]
        weights_J = shifted_J.exp()
        terms_J3 = torch.stack([weights_J, weights_J * shifted_J, torch.where(is_label_J, shifted_J, 0.0)], -1)
        sums_N3 = terms_J3.new_zeros(len(has_set_N), 3).index_add_(0, slots_J, terms_J3)
        if part is not None:
            part.reduce(sums_N3, "sum")
        total_N, moment_N, label_N = sums_N3.unbind(-1)
        total_N = torch.where(has_set_N, total_N, 1.0)
        log_total_N = total_N.log()
        entropy_N = log_total_N - moment_N / total_N
        log_probs_J = shifted_J - log_total_N[slots_J]
        ctx.save_for_backward(slots_J, rows_J, places_J, columns_J, is_label_J, log_probs_J, entropy_N)
        ctx.shape, ctx.dtype, ctx.temperature = logits_BSV.shape, logits_BSV.dtype, temperature
        return (label_N - log_total_N).float(), entropy_N.float()

    @staticmethod
    def backward(ctx: Any, *grads_N: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        slots_J, rows_J, places_J, columns_J, is_label_J, log_probs_J, entropy_N = ctx.saved_tensors
        log_prob_grad_J, entropy_grad_J = (grad_N.double()[slots_J] for grad_N in grads_N)
        probs_J = log_probs_J.exp()
        grad_J = log_prob_grad_J * (is_label_J.double() - probs_J)
        grad_J -= entropy_grad_J * probs_J * (log_probs_J + entropy_N[slots_J])
        grad_BSV = torch.zeros(ctx.shape, dtype=ctx.dtype, device=grad_J.device)
        grad_BSV[rows_J, places_J, columns_J] = (grad_J / ctx.temperature).to(ctx.dtype)
        return (grad_BSV, *[None] * 6)
