"""Policy gradient for the tokens with the highest entropy only (Wang et al. 2025, arXiv 2506.01939).

Shape legend: N inputs.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from roll_r3.batch.batch import Batch, FloatN


def weigh_by_entropy(batch: Batch, entropy_N: FloatN, share: float) -> tuple[Batch, dict[str, float]]:
    """Set the policy-gradient weight of trained tokens below a quantile of the step's entropies to 0.

    KL and entropy terms still see these tokens, and the denominator of the loss counts them, as in TRL. The gradient
    of the others thus does not grow as the share falls. Tokens at the threshold are kept.

    Args:
        entropy_N: entropy of the old policy at each input, nats.
        share: share of trained tokens to keep, in (0, 1].

    Returns:
        (batch with `pg_weights_N`, metrics).
    """
    trained_N = batch.loss_mask_N
    if not trained_N.any():
        return batch, {}
    threshold = np.quantile(entropy_N[trained_N].astype(np.float64), 1.0 - share)
    kept_N = np.where(trained_N & (entropy_N < threshold), 0.0, 1.0).astype(np.float32)
    weights_N = kept_N if batch.pg_weights_N is None else batch.pg_weights_N * kept_N
    return replace(batch, pg_weights_N=weights_N), {"critic/entropy/threshold": float(threshold)}
