"""Contract of the policy-gradient losses: inputs of a token, and its term.

A loss is a function of `PgInputs` in a module of its own, with a row in `roll_r3.algorithms.losses.variants`. The
weights of the batch, the KL term and the entropy bonus are common to all of them
(`roll_r3.algorithms.losses.policy_loss`). Shape legend: B x S token slots of this rank.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import KW_ONLY, dataclass

import torch

from roll_r3.algorithms.losses.sample_sums import SampleSums
from roll_r3.config.algorithm import AlgorithmConfig


@dataclass(frozen=True)
class TokenInputs:
    """Inputs of the loss besides the live log-probabilities, all of the same shape."""

    mask: torch.Tensor
    """bool: trained tokens."""
    advantages: torch.Tensor
    old_log_probs: torch.Tensor
    ref_log_probs: torch.Tensor | None = None
    _: KW_ONLY
    weights: torch.Tensor
    """Weight of each token's loss over the denominator of its optimizer step; 0 where the mask is False."""
    pg_weights: torch.Tensor | None = None
    """Factor of the policy-gradient term, without gradient; None: 1."""
    scores: torch.Tensor | None = None
    """Score of each token's sample; None if a batch has no scores."""
    sums: SampleSums | None = None
    """Sums over samples; None where no loss needs them."""


@dataclass(frozen=True)
class PgInputs:
    """Inputs of one policy-gradient loss, all of the same shape, and without effect where the mask is False."""

    mask: torch.Tensor
    """bool: trained tokens."""
    log_probs: torch.Tensor
    """Live log-probabilities with gradient, nats; 0 where the mask is False."""
    old_log_probs: torch.Tensor
    """Log-probabilities under the old policy, nats; 0 where the mask is False."""
    log_ratio: torch.Tensor
    """Log of the importance ratio with gradient, not clamped: of the token, or of its sample (see
    `importance_sampling`). 0 where the mask is False."""
    ratio: torch.Tensor
    """exp of `log_ratio` clamped to +-`MAX_LOG_RATIO`, with gradient."""
    advantages: torch.Tensor
    """0 where the mask is False."""
    scores: torch.Tensor | None
    """Score of each token's sample."""


@dataclass(frozen=True)
class PgTerm:
    """Policy-gradient loss of each token."""

    loss: torch.Tensor
    cut: torch.Tensor
    """bool: tokens with a truncated ratio, or without a gradient because of their ratio."""
    above: torch.Tensor | None = None
    """bool: ratios above the range of the loss; None for a loss without a range of ratios."""
    below: torch.Tensor | None = None
    """bool: ratios below it."""


PgLoss = Callable[[PgInputs, AlgorithmConfig], PgTerm]


def weighted_log_probs(weights: torch.Tensor, x: PgInputs) -> torch.Tensor:
    """Return -weight x advantage x log-probability: REINFORCE's loss with a weight that has no gradient."""
    return -weights.detach() * x.advantages * x.log_probs
