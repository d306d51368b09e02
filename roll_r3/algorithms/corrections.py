"""Corrections for the difference between rollout and trainer: weights of the policy-gradient loss, and filters.

All are constants of a step, known before its first optimizer step, so every trainer takes them as data. With
rho = pi_old / pi_rollout of each trained token: truncated importance sampling, Ionides 2008, between rollout and
trainer as in Yao et al. 2025 ("Your efficient RL framework secretly brings you off-policy RL training"); the band of
IcePop (Ling team 2025, "Small leak can sink a great ship"); filters as in ROLL and verl; off-policy sequence masking,
DeepSeek-V3.2 (arXiv 2512.02556, equation 9), with old in place of the live policy.

Shape legend: n samples, N inputs.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from roll_r3.algorithms.kl import MAX_LOG_RATIO
from roll_r3.algorithms.mismatch import DoubleN, MaskN, Mismatch, effective_share
from roll_r3.batch.batch import Batch
from roll_r3.config.sections import CorrectionFilter, RolloutCorrectionConfig


@dataclass(frozen=True)
class Corrected:
    """A corrected batch, and figures of the correction."""

    batch: Batch
    metrics: dict[str, float]


def corrected(batch: Batch, config: RolloutCorrectionConfig) -> Corrected:
    """Return the batch with weights and with the loss mask left by the filters.

    Every part looks at the batch as it came, so their order has no effect. A token with weight 0 stays in the
    denominator of the loss; a filtered one leaves it, and its advantage becomes 0. Figures are over all trained tokens,
    filtered ones included.

    Args:
        batch: needs advantages and old log-probabilities. Weights that it has already are multiplied.
    """
    mismatch = Mismatch.of(batch)
    weights_N, metrics = np.ones(len(batch.labels_N)), dict[str, float]()
    if config.is_weight is not None:
        weights_N, metrics = _importance(mismatch, config)
    if config.opsm_delta is not None:
        masked_n = _off_policy(mismatch, config.opsm_delta)
        weights_N = np.where(batch.per_sample(masked_n), 0.0, weights_N)
        metrics["rollout_corr/opsm_samples"] = _share(masked_n, mismatch.tokens_n > 0)
    if config.is_weight is not None or config.opsm_delta is not None:
        before_N = np.float32(1.0) if batch.pg_weights_N is None else batch.pg_weights_N
        weights_N = np.where(batch.loss_mask_N, weights_N * before_N, 0.0)
        batch = replace(batch, pg_weights_N=weights_N.astype(np.float32))
    if config.filters:
        kept_N = np.logical_and.reduce([_passes(mismatch, item) for item in config.filters])
        batch = _filtered(batch, kept_N)
        metrics |= _rejections(mismatch, kept_N)
    return Corrected(batch, metrics)


def _importance(mismatch: Mismatch, config: RolloutCorrectionConfig) -> tuple[DoubleN, dict[str, float]]:
    """Return min(ratio, is_cap), or with is_floor the ratio inside [is_floor, is_cap] and 0 outside; and figures."""
    assert config.is_weight is not None
    ratios_N = mismatch.ratios(config.is_weight)
    cap = np.inf if config.is_cap is None else config.is_cap
    outside_N = ratios_N > cap
    weights_N = np.minimum(ratios_N, cap)
    if config.is_floor is not None:
        outside_N |= ratios_N < config.is_floor
        weights_N = np.where(outside_N, 0.0, ratios_N)
    mask_N = mismatch.batch.loss_mask_N
    if not mask_N.any():
        return weights_N, {}
    return weights_N, {
        "actor/is_weight_mean": float(weights_N[mask_N].mean()),
        "actor/is_weight_clipfrac": float(outside_N[mask_N].mean()),
        "rollout_corr/ess": effective_share(weights_N[mask_N]),
    }


def _off_policy(mismatch: Mismatch, delta: float) -> MaskN:
    """Return the samples to mask: pushed down, and with a mean of log pi_rollout - log pi_old above delta. [n]

    Advantages of one sample's tokens differ under a KL penalty or a clip. Their sum decides, the direction of the whole
    sample.
    """
    batch = mismatch.batch
    assert batch.advantages_N is not None
    pushed_down_n = batch.sum_per_sample(np.where(batch.loss_mask_N, batch.advantages_N, 0.0)) < 0
    means_n = -batch.sum_per_sample(mismatch.log_ratios_N) / np.maximum(mismatch.tokens_n, 1)
    masked_n: MaskN = pushed_down_n & (means_n > delta)
    return masked_n


def _passes(mismatch: Mismatch, item: CorrectionFilter) -> MaskN:
    """Return the tokens kept by a filter; bounds are kept too. [N]"""
    if item.statistic == "ratio":
        values_N = mismatch.ratios(item.level)
    elif item.statistic == "diff":
        batch = mismatch.batch
        assert batch.old_log_probs_N is not None
        old_N, rollout_N = (np.exp(x.astype(np.float64)) for x in (batch.old_log_probs_N, batch.rollout_log_probs_N))
        values_N = mismatch.at_level(old_N - rollout_N, item.level)
    else:
        gaps_N = mismatch.log_ratios_N.clip(-MAX_LOG_RATIO, MAX_LOG_RATIO)
        values_N = mismatch.at_level(np.expm1(gaps_N) - gaps_N, item.level)
    low = -np.inf if item.low is None else item.low
    high = np.inf if item.high is None else item.high
    kept_N: MaskN = (values_N >= low) & (values_N <= high)
    return kept_N


def _filtered(batch: Batch, kept_N: MaskN) -> Batch:
    """Return the batch with other tokens out of its loss mask, advantages and weights."""
    mask_N = batch.loss_mask_N & kept_N
    advantages_N, weights_N = (
        None if x is None else np.where(mask_N, x, np.float32(0)) for x in (batch.advantages_N, batch.pg_weights_N)
    )
    return replace(batch, loss_mask_N=mask_N, advantages_N=advantages_N, pg_weights_N=weights_N)


def _rejections(mismatch: Mismatch, kept_N: MaskN) -> dict[str, float]:
    """Return the share of rejected tokens, and of samples without a token left."""
    batch = mismatch.batch
    left_n = batch.sum_per_sample(batch.loss_mask_N & kept_N)
    return {
        "rollout_corr/rejected_tokens": _share(~kept_N, batch.loss_mask_N),
        "rollout_corr/rejected_samples": _share(left_n == 0, mismatch.tokens_n > 0),
    }


def _share(chosen: MaskN, among: MaskN) -> float:
    """Return the share of True entries among some; 0 of none."""
    return float(chosen[among].mean()) if among.any() else 0.0
