"""Mismatch between the trainer's and the rollout's policy on the sampled tokens.

Names and formulas: verl's `training/rollout_probs_diff_*` and `rollout_corr/*`, SkyRL's
`rollout_train_logprobs_abs_diff_*`; the extreme-ratio share is F(tau = 2) of the R3 paper (arXiv 2510.11370).
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt


def mismatch_metrics(
    train_log_probs: npt.NDArray[np.float32], rollout_log_probs: npt.NDArray[np.float32]
) -> dict[str, float]:
    """Compute figures over trained tokens (1-D arrays of equal length, nats), sampled by the rollout.

    kl is the k1 and k3_kl the k3 estimate of KL(rollout || trainer): with d = log rollout - log trainer, the means
    of d and of exp(-d) - 1 + d.
    """
    if not len(train_log_probs):
        return {}
    train, rollout = train_log_probs.astype(np.float64), rollout_log_probs.astype(np.float64)
    d = rollout - train
    probs_diff = np.abs(np.exp(train) - np.exp(rollout))
    log_diff = np.abs(d)
    return {
        "training/rollout_probs_diff_mean": float(probs_diff.mean()),
        "training/rollout_probs_diff_max": float(probs_diff.max()),
        "training/rollout_probs_diff_std": float(probs_diff.std()),
        "actor/rollout_train_logprobs_abs_diff_mean": float(log_diff.mean()),
        "actor/rollout_train_logprobs_abs_diff_max": float(log_diff.max()),
        "rollout_corr/kl": float(d.mean()),
        "rollout_corr/k3_kl": float((np.expm1(-d) + d).mean()),
        "rollout_corr/extreme_ratio_tau2": float((log_diff > np.log(2.0)).mean()),
    }
