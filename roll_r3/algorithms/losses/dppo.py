"""DPPO with the binary total-variation mask (arXiv 2602.04879)."""

from __future__ import annotations

import torch

from roll_r3.algorithms.losses.base import PgInputs, PgTerm, weighted_log_probs
from roll_r3.config.algorithm import AlgorithmConfig


def dppo_tv(x: PgInputs, config: AlgorithmConfig) -> PgTerm:
    """Return -min(ratio, dppo_max_ratio) x advantage x log-probability, without tokens that left the trust region.

    These are tokens pushed further from the old policy, after their probability moved by more than the clip range: up
    by more than pg_clip_high with a positive advantage, down by more than pg_clip_low with a negative one. A difference
    of probabilities leaves rare tokens free, which a ratio clips first.
    """
    low, high = config.clip_range
    moved = (x.log_probs.exp() - x.old_log_probs.exp()).detach()
    cut = ((x.advantages > 0) & (moved > high)) | ((x.advantages < 0) & (moved < -low))
    loss = weighted_log_probs(x.ratio.clamp(max=config.pg_args.dppo_max_ratio), x)
    return PgTerm(torch.where(cut, 0.0, loss), cut)
