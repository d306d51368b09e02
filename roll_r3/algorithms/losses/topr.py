"""Tapered off-policy REINFORCE (TOPR, arXiv 2503.14286), per token as in ROLL.

The paper tapers with the ratio of whole sequences; ROLL, and this module, with the ratio of each token.
"""

from __future__ import annotations

import torch

from roll_r3.algorithms.losses.base import PgInputs, PgTerm, weighted_log_probs
from roll_r3.config.algorithm import AlgorithmConfig


def topr(x: PgInputs, config: AlgorithmConfig) -> PgTerm:
    """Return REINFORCE's loss; in samples with a score of 0 or less it is weighted by min(ratio, 1).

    Both kinds of samples have a weight in `pg_args`.
    """
    assert x.scores is not None, "a scored batch has scores_n"
    positive = x.scores > 0
    weights = torch.where(
        positive,
        config.pg_args.topr_positive_weight,
        config.pg_args.topr_negative_weight * x.ratio.clamp(max=1.0),
    )
    return PgTerm(weighted_log_probs(weights, x), ~positive & (x.ratio > 1.0))
