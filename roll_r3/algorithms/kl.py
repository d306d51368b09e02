"""Estimates of the KL divergence between policy and reference, from tokens sampled by the policy.

Sources: J. Schulman, "Approximating KL Divergence" (2020), http://joschu.net/blog/kl-approx.html; the ratio before the
estimate is from DeepSeek-V3.2 (arXiv 2512.02556). docs/algorithm.md gives the gradient of each estimate in each place.
"""

from __future__ import annotations

import torch

MAX_LOG_RATIO = 20.0
"""Bound of log ratios before exp, to prevent overflow in fp32. Tokens beyond it carry no information."""
MAX_K3 = 10.0
"""Upper bound of k3, as in ROLL and verl: policy 2.6 nats below the reference, or 11 above it."""


def kl_estimate(
    log_probs: torch.Tensor, ref_log_probs: torch.Tensor, estimator: str, ratio: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Estimate the KL divergence of each token; clamped estimates have no gradient.

    With d = log policy - log reference, clamped to +-20: k1 = d (unbiased, may be negative), k2 = d^2 / 2 (biased, low
    variance), abs = |d|, k3 = exp(-d) - 1 + d (unbiased, never negative), clamped to at most 10.

    Args:
        log_probs: log-probabilities under the policy, nats.
        ref_log_probs: log-probabilities under the reference, same shape.
        ratio: policy / sampling policy; multiplies the estimate before k3's clamp.

    Returns:
        (estimate in nats, True where clamped), each with the shape of the inputs.

    Raises:
        ValueError: an unknown estimator.
    """
    gap = log_probs - ref_log_probs
    d, clamped = gap.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO), gap.abs() > MAX_LOG_RATIO
    if estimator == "k1":
        kl = d
    elif estimator == "k2":
        kl = d.square() / 2
    elif estimator == "abs":
        kl = d.abs()
    elif estimator == "k3":
        kl = torch.expm1(-d) + d
    else:
        raise ValueError(f"KL estimator must be k1, k2, k3 or abs, got {estimator!r}")
    if ratio is not None:
        kl = ratio * kl
    if estimator == "k3":
        clamped = clamped | (kl > MAX_K3)
        kl = kl.clamp(max=MAX_K3)
    return torch.where(clamped, kl.detach(), kl), clamped
