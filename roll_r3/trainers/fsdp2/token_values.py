"""Log-probabilities and entropy of whole rows of logits. Shape legend: B x S tokens of this rank, V vocabulary."""

from __future__ import annotations

import torch


def label_log_probs_and_entropy(
    logits_BSV: torch.Tensor, labels_BS: torch.Tensor, *, temperature: float, entropy_gradient: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probability of each label, and entropy, under the sampling temperature, in nats.

    Args:
        entropy_gradient: True makes the entropy differentiable, like the log-probabilities.

    Returns:
        fp32 [B, S] each.
    """
    log_probs_BSV = (logits_BSV.float() / temperature).log_softmax(-1)
    with torch.set_grad_enabled(entropy_gradient and torch.is_grad_enabled()):
        entropy_BS = -(log_probs_BSV.exp() * log_probs_BSV).sum(-1)
    return log_probs_BSV.gather(-1, labels_BS.unsqueeze(-1)).squeeze(-1), entropy_BS
