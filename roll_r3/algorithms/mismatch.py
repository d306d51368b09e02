"""Mismatch between the trainer's and the rollout's policy on the sampled tokens.

Names and formulas: verl's `training/rollout_probs_diff_*` and `rollout_corr/*`, SkyRL's
`rollout_train_logprobs_abs_diff_*`; the extreme-ratio share is F(tau = 2) of the R3 paper (arXiv 2510.11370).
Shape legend: n samples, N inputs.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from roll_r3.algorithms.kl import MAX_LOG_RATIO
from roll_r3.batch.batch import Batch

DoubleN = npt.NDArray[np.float64]
MaskN = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class Mismatch:
    """Log ratios between the old policy and the rollout, in float64."""

    batch: Batch
    log_ratios_N: DoubleN
    """log pi_old - log pi_rollout, nats; 0 for untrained tokens."""
    tokens_n: DoubleN
    """Trained tokens of each sample."""

    @classmethod
    def of(cls, batch: Batch) -> Mismatch:
        """Compare the two sides on the trained tokens."""
        assert batch.old_log_probs_N is not None
        old_N, rollout_N = (x.astype(np.float64) for x in (batch.old_log_probs_N, batch.rollout_log_probs_N))
        gap_N = np.subtract(old_N, rollout_N, out=np.zeros(len(old_N)), where=batch.loss_mask_N)
        return cls(batch, gap_N, batch.sum_per_sample(batch.loss_mask_N))

    def at_level(self, values_N: DoubleN, level: str) -> DoubleN:
        """Return each token's value (token), or its sample's sum (sequence) or mean (geometric) over trained tokens."""
        if level == "token":
            return values_N
        sums_n = self.batch.sum_per_sample(np.where(self.batch.loss_mask_N, values_N, 0.0))
        return self.batch.per_sample(sums_n if level == "sequence" else sums_n / np.maximum(self.tokens_n, 1))

    def ratios(self, level: str) -> DoubleN:
        """Return each token's ratio, their product over its sample (sequence), or their geometric mean."""
        return exp_bounded(self.at_level(self.log_ratios_N, level))


def exp_bounded(log_ratios: DoubleN) -> DoubleN:
    """Return exp of log ratios, which are clamped to +-20 first."""
    ratios: DoubleN = np.exp(log_ratios.clip(-MAX_LOG_RATIO, MAX_LOG_RATIO))
    return ratios


def effective_share(weights: DoubleN) -> float:
    """Return the effective sample size of weights as a share of their number: (mean w)^2 / mean w^2; 0 if all are 0."""
    squares = float(np.square(weights).mean())
    return float(weights.mean()) ** 2 / squares if squares else 0.0


def mismatch_metrics(batch: Batch, sampled_N: MaskN) -> dict[str, float]:
    """Compute figures over the tokens sampled by the rollout.

    kl is the k1 and k3_kl the k3 estimate of KL(rollout || trainer): with d = log rollout - log trainer, the means
    of d and of exp(-d) - 1 + d. chi2_token and chi2_seq are the means of ratio^2 - 1, with trainer / rollout of each
    token or sample.

    Args:
        batch: needs old log-probabilities.
        sampled_N: tokens to compare, trained or not.
    """
    if not sampled_N.any():
        return {}
    assert batch.old_log_probs_N is not None
    mismatch = Mismatch.of(replace(batch, loss_mask_N=sampled_N))
    d = -mismatch.log_ratios_N[sampled_N]
    train, rollout = (
        np.exp(x[sampled_N].astype(np.float64)) for x in (batch.old_log_probs_N, batch.rollout_log_probs_N)
    )
    probs_diff, log_diff, ratios = np.abs(train - rollout), np.abs(d), exp_bounded(-d)
    sums_n = batch.sum_per_sample(mismatch.log_ratios_N)[mismatch.tokens_n > 0]
    return {
        "training/rollout_probs_diff_mean": float(probs_diff.mean()),
        "training/rollout_probs_diff_max": float(probs_diff.max()),
        "training/rollout_probs_diff_std": float(probs_diff.std()),
        "actor/rollout_train_logprobs_abs_diff_mean": float(log_diff.mean()),
        "actor/rollout_train_logprobs_abs_diff_max": float(log_diff.max()),
        "rollout_corr/kl": float(d.mean()),
        "rollout_corr/k3_kl": float((np.expm1(-d) + d).mean()),
        "rollout_corr/extreme_ratio_tau2": float((log_diff > np.log(2.0)).mean()),
        "rollout_corr/ess": effective_share(ratios),
        "rollout_corr/chi2_token": float(np.square(ratios).mean() - 1),
        "rollout_corr/chi2_seq": float(np.square(exp_bounded(sums_n)).mean() - 1),
        "rollout_corr/max_seq_log_ratio": float(np.abs(sums_n).max()),
    }
