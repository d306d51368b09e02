"""Loss of each token: the configured policy gradient, with optional weights, KL term and entropy bonus.

Weights of the policy gradient come with the batch, from `roll_r3.algorithms.corrections`.
"""

from __future__ import annotations

import torch

from roll_r3.algorithms.kl import MAX_LOG_RATIO, kl_estimate
from roll_r3.algorithms.losses.base import PgInputs, TokenInputs
from roll_r3.algorithms.losses.variants import PG_LOSSES
from roll_r3.algorithms.stats import TokenStats
from roll_r3.config.algorithm import AlgorithmConfig


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
    ratio = _exp(log_ratio)
    loss = _policy_gradient(log_probs, log_ratio, ratio, x, config, stats)
    stats.add_share("actor/pg_loss", (loss * x.weights).sum())
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
    log_probs: torch.Tensor,
    log_ratio: torch.Tensor,
    ratio: torch.Tensor,
    x: TokenInputs,
    config: AlgorithmConfig,
    stats: TokenStats,
) -> torch.Tensor:
    """Compute the weighted policy-gradient term; 0 where the mask is False."""
    if config.importance_sampling == "seq":
        log_ratio = _of_samples(log_ratio, x)
        ratio = _exp(log_ratio)
    inputs = PgInputs(
        mask=x.mask,
        log_probs=torch.where(x.mask, log_probs, 0.0),
        old_log_probs=torch.where(x.mask, x.old_log_probs, 0.0),
        log_ratio=log_ratio,
        ratio=ratio,
        advantages=torch.where(x.mask, x.advantages, 0.0),
        scores=x.scores,
    )
    term = PG_LOSSES[config.pg_variant](inputs, config)
    loss = term.loss if x.pg_weights is None else term.loss * x.pg_weights
    stats.add("actor/ratio_mean", inputs.ratio, x.mask)
    stats.add("actor/ratio_max", inputs.ratio, x.mask, "max")
    stats.add("actor/ratio_min", inputs.ratio, x.mask, "min")
    stats.add("actor/pg_clipfrac", term.cut.float(), x.mask)
    if term.above is not None and term.below is not None:
        stats.add("actor/ppo_ratio_high_clipfrac", term.above.float(), x.mask)
        stats.add("actor/ppo_ratio_low_clipfrac", term.below.float(), x.mask)
        stats.add("actor/ppo_ratio_clipfrac", (term.above | term.below).float(), x.mask)
    return loss


def _of_samples(log_ratio: torch.Tensor, x: TokenInputs) -> torch.Tensor:
    """Replace the log ratio of each token by the mean over its sample (GSPO, arXiv 2507.18071).

    Its gradient is that of the token alone. Added up over a sample whose tokens share one factor, and divided by their
    number, this is the gradient of the mean.
    """
    assert x.sums is not None, "importance_sampling: seq needs sums over samples"
    means = x.sums.means(log_ratio, x.mask).to(log_ratio.dtype)
    return torch.where(x.mask, means + (log_ratio - log_ratio.detach()), 0.0)


def _exp(log_ratio: torch.Tensor) -> torch.Tensor:
    return log_ratio.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()
