"""GRPO and Dr. GRPO."""

from __future__ import annotations

from roll_r3.algorithms.advantages.base import Estimator, Float64n, ScoredSamples
from roll_r3.algorithms.advantages.moments import divisors_of, means_of
from roll_r3.config.algorithm import AlgorithmConfig


def _rewards(samples: ScoredSamples, config: AlgorithmConfig) -> Float64n:
    """Compute (score - group mean) / (group deviation + 1e-6), Shao et al. 2024 (arXiv 2402.03300).

    Without the division it is Dr. GRPO's (Liu et al. 2025, arXiv 2503.20783). A group of one sample has 0.
    """
    centred_n = samples.scores_n - means_of(samples.scores_n, samples.groups)
    if config.norm_adv_by_std_in_grpo:
        centred_n = centred_n / divisors_of(samples.scores_n, samples.groups)
    return centred_n


GRPO = Estimator("grpo", _rewards)
