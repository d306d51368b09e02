"""REINFORCE without a ratio (Williams 1992)."""

from __future__ import annotations

import torch

from roll_r3.algorithms.losses.base import PgInputs, PgTerm
from roll_r3.config.algorithm import AlgorithmConfig


def vanilla(x: PgInputs, config: AlgorithmConfig) -> PgTerm:
    """Return -advantage x log-probability. Off policy it is biased, since nothing corrects for the ratio."""
    return PgTerm(-x.advantages * x.log_probs, torch.zeros_like(x.mask))
