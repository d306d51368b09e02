"""Truncated importance sampling (Ionides 2008) of REINFORCE's loss, as in ROLL."""

from __future__ import annotations

from roll_r3.algorithms.losses.base import PgInputs, PgTerm, weighted_log_probs
from roll_r3.config.algorithm import AlgorithmConfig


def tis(x: PgInputs, config: AlgorithmConfig) -> PgTerm:
    """Return -ratio x advantage x log-probability, with the ratio within the bounds of `pg_args` and no gradient."""
    low, high = config.pg_args.tis_lower_bound, config.pg_args.tis_upper_bound
    above, below = x.ratio > high, x.ratio < low
    return PgTerm(weighted_log_probs(x.ratio.clamp(low, high), x), above | below, above, below)
