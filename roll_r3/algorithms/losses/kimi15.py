"""Loss of Kimi k1.5 (arXiv 2501.12599, equation 3), per token as in ROLL.

The paper squares the log ratio of a whole response; ROLL, and this module, that of each token.
"""

from __future__ import annotations

import torch

from roll_r3.algorithms.losses.base import PgInputs, PgTerm
from roll_r3.config.algorithm import AlgorithmConfig


def kimi15(x: PgInputs, config: AlgorithmConfig) -> PgTerm:
    """Return -advantage x log-probability + kimi15_tau / 2 x (log ratio)^2, the second with gradient."""
    loss = -x.advantages * x.log_probs + config.pg_args.kimi15_tau / 2 * x.log_ratio.square()
    return PgTerm(loss, torch.zeros_like(x.mask))
