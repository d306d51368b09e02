"""REINFORCE++ with a baseline."""

from __future__ import annotations

from roll_r3.algorithms.advantages.base import Estimator, Float64n, ScoredSamples
from roll_r3.algorithms.advantages.moments import means_of
from roll_r3.config.algorithm import AlgorithmConfig


def _rewards(samples: ScoredSamples, config: AlgorithmConfig) -> Float64n:
    """Compute score - group mean (Hu 2025, arXiv 2501.03262); the tokens of the step are whitened afterwards.

    The deviation is the step's, so a group of nearly equal scores is not blown up. Whitening follows the KL penalty, as
    in OpenRLHF.
    """
    return samples.scores_n - means_of(samples.scores_n, samples.groups)


REINFORCE_PLUS_PLUS_BASELINE = Estimator("reinforce_plus_plus_baseline", _rewards, whitens_step=True)
