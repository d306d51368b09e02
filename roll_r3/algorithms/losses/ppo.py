"""PPO's clipped objective.

Sources: Schulman et al. 2017 (arXiv 1707.06347); asymmetric clipping, DAPO (arXiv 2503.14476); the dual clip, Ye et al.
2019 (arXiv 1912.09729). With the ratio of the sample it is GSPO (arXiv 2507.18071).
"""

from __future__ import annotations

import torch

from roll_r3.algorithms.kl import MAX_LOG_RATIO
from roll_r3.algorithms.losses.base import PgInputs, PgTerm
from roll_r3.config.algorithm import AlgorithmConfig


def ppo(x: PgInputs, config: AlgorithmConfig) -> PgTerm:
    """Return -min(ratio x advantage, clipped ratio x advantage), with the dual clip if configured."""
    low, high = config.clip_range
    clipped_ratio = x.ratio.clamp(1 - low, 1 + high)
    surrogate = torch.minimum(x.ratio * x.advantages, clipped_ratio * x.advantages)
    above, below = x.ratio > 1 + high, x.ratio < 1 - low
    cut = (above & (x.advantages > 0)) | (below & (x.advantages < 0))
    if config.dual_clip_loss is not None:
        bound = config.dual_clip_loss * x.advantages
        surrogate = torch.where(x.advantages < 0, torch.maximum(surrogate, bound), surrogate)
        cut = cut | ((x.ratio > config.dual_clip_loss) & (x.advantages < 0))
    cut = cut | ((x.log_ratio.abs() > MAX_LOG_RATIO) & (x.advantages != 0))
    return PgTerm(-surrogate, cut, above, below)
