"""Clipped policy-gradient loss per token, with optional KL, entropy and correction terms.

Sources: PPO's clipped objective, Schulman et al. 2017 (arXiv 1707.06347); asymmetric clipping, DAPO (arXiv
2503.14476); the dual clip, Ye et al. 2019 (arXiv 1912.09729); truncated importance sampling, Ionides 2008, used
between rollout and trainer as in Yao et al. 2025 ("Your efficient RL framework secretly brings you off-policy RL
training").
"""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass

import torch

from roll_r3.algorithms.kl import MAX_LOG_RATIO, kl_estimate
from roll_r3.algorithms.stats import TokenStats
from roll_r3.config.algorithm import AlgorithmConfig


@dataclass(frozen=True)
class TokenInputs:
    """Inputs of the loss besides the live log-probabilities, all of the same shape."""

    mask: torch.Tensor
    """bool: trained tokens."""
    advantages: torch.Tensor
    old_log_probs: torch.Tensor
    rollout_log_probs: torch.Tensor
    ref_log_probs: torch.Tensor | None = None
    _: KW_ONLY
    weights: torch.Tensor
    """Weight of each token's loss over the denominator of its optimizer step; 0 where the mask is False."""


def policy_loss(
    log_probs: torch.Tensor, entropy: torch.Tensor | None, x: TokenInputs, config: AlgorithmConfig, stats: TokenStats
) -> torch.Tensor:
    """Compute the loss of each token (0 where the mask is False), before `TokenInputs.weights`.

    Args:
        log_probs: live log-probabilities of the labels, with gradient, nats.
        entropy: entropy of the live distribution at each input, nats; with gradient if the bonus is on.
        stats: receives the token statistics and the terms of the loss.

    Returns:
        float32, the shape of `log_probs`.
    """
    # terms of untrained tokens are set to 0 before exp, so that no inf * 0 arises
    log_ratio = torch.where(x.mask, log_probs - x.old_log_probs, 0.0)
    ratio = log_ratio.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()
    loss = _policy_gradient(log_ratio, ratio, x, config, stats)
    stats.add_share("actor/pg_loss", (loss * x.weights).sum())
    stats.add("actor/ratio_mean", ratio, x.mask)
    stats.add("actor/ratio_max", ratio, x.mask, "max")
    stats.add("actor/ratio_min", ratio, x.mask, "min")
    stats.add("actor/approxkl", log_ratio.square() / 2, x.mask)
    stats.add("actor/policykl", -log_ratio, x.mask)
    if x.ref_log_probs is not None and config.use_kl_loss:
        live, ref = (torch.where(x.mask, t, 0.0) for t in (log_probs, x.ref_log_probs))
        kl, clamped = kl_estimate(live, ref, config.kl_estimator, ratio if config.use_unbiased_kl else None)
        stats.add_share("actor/kl_loss", (kl * x.weights).sum())
        stats.add("actor/kl_clamped", clamped.float(), x.mask)
        loss = loss + config.kl_loss_coef * kl
    if entropy is not None:
        stats.add("actor/entropy", entropy, x.mask)
        if config.entropy_loss_coef:
            loss = loss - config.entropy_loss_coef * torch.where(x.mask, entropy, 0.0)
    return torch.where(x.mask, loss, 0.0)


def _policy_gradient(
    log_ratio: torch.Tensor, ratio: torch.Tensor, x: TokenInputs, config: AlgorithmConfig, stats: TokenStats
) -> torch.Tensor:
    """Compute the clipped term, weighted by `rollout_correction`; 0 where the mask is False."""
    low, high = config.clip_range
    advantages = torch.where(x.mask, x.advantages, 0.0)
    clipped_ratio = ratio.clamp(1 - low, 1 + high)
    surrogate = torch.minimum(ratio * advantages, clipped_ratio * advantages)
    above, below = ratio > 1 + high, ratio < 1 - low
    cut = (above & (advantages > 0)) | (below & (advantages < 0))
    if config.dual_clip_loss is not None:
        bound = config.dual_clip_loss * advantages
        surrogate = torch.where(advantages < 0, torch.maximum(surrogate, bound), surrogate)
        cut = cut | ((ratio > config.dual_clip_loss) & (advantages < 0))
    pg = -surrogate
    if config.rollout_correction.mode == "token_tis":
        log_weight = torch.where(x.mask, x.old_log_probs - x.rollout_log_probs, 0.0)
        weight = log_weight.clamp(max=MAX_LOG_RATIO).exp()
        stats.add("actor/is_weight_clipfrac", (weight > config.rollout_correction.cap).float(), x.mask)
        weight = weight.clamp(max=config.rollout_correction.cap)
        stats.add("actor/is_weight_mean", weight, x.mask)
        pg = pg * weight
    cut = cut | ((log_ratio.abs() > MAX_LOG_RATIO) & (advantages != 0))
    stats.add("actor/pg_clipfrac", cut.float(), x.mask)
    stats.add("actor/ppo_ratio_high_clipfrac", above.float(), x.mask)
    stats.add("actor/ppo_ratio_low_clipfrac", below.float(), x.mask)
    stats.add("actor/ppo_ratio_clipfrac", (above | below).float(), x.mask)
    return pg
