"""CISPO: REINFORCE weighted by a clipped ratio (MiniMax-M1, arXiv 2506.13585)."""

from __future__ import annotations

import torch

from roll_r3.algorithms.losses.base import PgInputs, PgTerm, weighted_log_probs
from roll_r3.config.algorithm import AlgorithmConfig


def cispo(x: PgInputs, config: AlgorithmConfig) -> PgTerm:
    """Return -clipped ratio x advantage x log-probability; the clipped ratio has no gradient, so all tokens learn.

    With `cispo_use_unified_mask` (equation 7 of the paper) tokens cut by PPO are left out.
    """
    low, high = config.clip_range
    above, below = x.ratio > 1 + high, x.ratio < 1 - low
    loss = weighted_log_probs(x.ratio.clamp(1 - low, 1 + high), x)
    if not config.pg_args.cispo_use_unified_mask:
        return PgTerm(loss, above | below, above, below)
    masked = (above & (x.advantages > 0)) | (below & (x.advantages < 0))
    return PgTerm(torch.where(masked, 0.0, loss), masked, above, below)
