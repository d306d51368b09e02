"""Log-probabilities and entropy of logits split over tensor-parallel ranks.

Shape legend: B x S tokens of this rank, V vocabulary columns of this tensor-parallel rank (the last rank may hold
padded columns without a token).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.tensor_parallel import vocab_parallel_cross_entropy

from roll_r3.batch.micro_batch import KeptSlots
from roll_r3.trainers.kept_values import VocabularyPart, kept_log_probs_and_entropy

_NO_TOKEN = -1e9
"""Logit of a padded column: its probability is exactly 0, and unlike -inf it never gives 0 * inf."""


def label_log_probs_and_entropy(
    logits_BSV: torch.Tensor,
    labels_BS: torch.Tensor,
    kept: KeptSlots | None = None,
    *,
    temperature: float,
    vocab_size: int,
    entropy_gradient: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probability of each label, and entropy, under the sampling temperature, in nats.

    Args:
        kept: sets of the labels, over which both are taken; None: the whole vocabulary.
        vocab_size: number of columns with a token, over all ranks.
        entropy_gradient: True makes the entropy differentiable, like the log-probabilities.

    Returns:
        fp32 [B, S] each, the same on every tensor-parallel rank.
    """
    if kept is not None:
        part = _vocabulary_part(logits_BSV.size(-1))
        return kept_log_probs_and_entropy(
            logits_BSV, labels_BS, kept, temperature=temperature, entropy_gradient=entropy_gradient, part=part
        )
    logits_BSV = logits_BSV.float() / temperature
    columns = logits_BSV.size(-1)
    held = vocab_size - parallel_state.get_tensor_model_parallel_rank() * columns
    if held < columns:
        padded_V = torch.arange(columns, device=logits_BSV.device) >= held
        logits_BSV = logits_BSV.masked_fill(padded_V, _NO_TOKEN)
    with torch.set_grad_enabled(entropy_gradient and torch.is_grad_enabled()):
        entropy_BS: torch.Tensor = _VocabParallelEntropy.apply(logits_BSV)  # type: ignore[no-untyped-call]
    # last, because megatron's cross entropy overwrites its input; nothing above needs it for its gradient
    return -vocab_parallel_cross_entropy(logits_BSV, labels_BS), entropy_BS


def _vocabulary_part(columns: int) -> VocabularyPart | None:
    """Return the part of the vocabulary of this tensor-parallel rank; None without tensor parallelism."""
    if parallel_state.get_tensor_model_parallel_world_size() == 1:
        return None
    group = parallel_state.get_tensor_model_parallel_group()
    operations = {"sum": dist.ReduceOp.SUM, "max": dist.ReduceOp.MAX}

    def reduce(values: torch.Tensor, operation: str) -> None:
        dist.all_reduce(values, operations[operation], group=group)

    return VocabularyPart(parallel_state.get_tensor_model_parallel_rank() * columns, reduce)


class _VocabParallelEntropy(torch.autograd.Function):
    """H = log Z - sum(p * z), and dH/dz = -p * (log p + H)."""

    @staticmethod
    def forward(ctx: Any, logits_BSV: torch.Tensor) -> torch.Tensor:
        group = parallel_state.get_tensor_model_parallel_group()
        peak_BS1 = logits_BSV.amax(-1, keepdim=True)
        dist.all_reduce(peak_BS1, dist.ReduceOp.MAX, group=group)
        shifted_BSV = logits_BSV - peak_BS1
        weights_BSV = shifted_BSV.exp()
        sums_2BS1 = torch.stack([weights_BSV.sum(-1, keepdim=True), (weights_BSV * shifted_BSV).sum(-1, keepdim=True)])
        dist.all_reduce(sums_2BS1, group=group)
        total_BS1, moment_BS1 = sums_2BS1
        log_total_BS1 = total_BS1.log()
        entropy_BS1: torch.Tensor = log_total_BS1 - moment_BS1 / total_BS1
        ctx.save_for_backward(shifted_BSV, log_total_BS1, entropy_BS1)
        return entropy_BS1.squeeze(-1)

    @staticmethod
    def backward(ctx: Any, grad_BS: torch.Tensor) -> torch.Tensor:
        saved: tuple[torch.Tensor, torch.Tensor, torch.Tensor] = ctx.saved_tensors
        shifted_BSV, log_total_BS1, entropy_BS1 = saved
        log_probs_BSV = shifted_BSV - log_total_BS1
        return -grad_BS.unsqueeze(-1) * log_probs_BSV.exp() * (log_probs_BSV + entropy_BS1)
