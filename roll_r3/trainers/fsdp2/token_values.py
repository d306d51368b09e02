"""Log-probabilities and entropy of whole rows of logits. Shape legend: B x S tokens of this rank, V vocabulary."""

from __future__ import annotations

import torch

from roll_r3.batch.micro_batch import KeptSlots
from roll_r3.trainers.kept_values import kept_log_probs_and_entropy


def label_log_probs_and_entropy(
    logits_BSV: torch.Tensor,
    labels_BS: torch.Tensor,
    kept: KeptSlots | None = None,
    *,
    temperature: float,
    entropy_gradient: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probability of each label, and entropy, under the sampling temperature, in nats.

    Args:
        kept: sets of the labels, over which both are taken; None: the whole vocabulary.
        entropy_gradient: True makes the entropy differentiable, like the log-probabilities.

    Returns:
        fp32 [B, S] each.
    """
    if kept is not None:
        return kept_log_probs_and_entropy(
            logits_BSV, labels_BS, kept, temperature=temperature, entropy_gradient=entropy_gradient
        )
    log_probs_BSV = (logits_BSV.float() / temperature).log_softmax(-1)
    with torch.set_grad_enabled(entropy_gradient and torch.is_grad_enabled()):
        entropy_BS = -(log_probs_BSV.exp() * log_probs_BSV).sum(-1)
    return log_probs_BSV.gather(-1, labels_BS.unsqueeze(-1)).squeeze(-1), entropy_BS
