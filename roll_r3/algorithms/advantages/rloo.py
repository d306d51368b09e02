"""RLOO: the other samples of the group are the baseline."""

from __future__ import annotations

import numpy as np

from roll_r3.algorithms.advantages.base import Estimator, Float64n, ScoredSamples
from roll_r3.algorithms.advantages.moments import means_of
from roll_r3.config.algorithm import AlgorithmConfig


def _rewards(samples: ScoredSamples, config: AlgorithmConfig) -> Float64n:
    """Compute score - mean of the group's other samples, Ahmadian et al. 2024 (arXiv 2402.14740).

    It equals n / (n - 1) x (score - group mean). As the baseline is independent of the sample, the gradient is
    unbiased. A group of one sample has 0.
    """
    factors_n = np.zeros_like(samples.scores_n)
    for members in samples.groups:
        if len(members) > 1:
            factors_n[members] = len(members) / (len(members) - 1)
    return factors_n * (samples.scores_n - means_of(samples.scores_n, samples.groups))


RLOO = Estimator("rloo", _rewards)
