"""REINFORCE, with or without a baseline, as ROLL normalises it."""

from __future__ import annotations

from roll_r3.algorithms.advantages.base import Estimator, Float64n, Members, ScoredSamples
from roll_r3.algorithms.advantages.moments import divisors_of, means_of
from roll_r3.config.algorithm import AlgorithmConfig


def _rewards(samples: ScoredSamples, config: AlgorithmConfig) -> Float64n:
    """Compute (score - mean) / (deviation + 1e-6) over groups or domains, by norm_mean_type and norm_std_type.

    null leaves a term out. A group or domain of one sample is not divided (in ROLL it would be NaN).
    """
    rewards_n = samples.scores_n
    if config.norm_mean_type is not None:
        rewards_n = rewards_n - means_of(samples.scores_n, _parts(samples, config.norm_mean_type))
    if config.norm_std_type is not None:
        rewards_n = rewards_n / divisors_of(samples.scores_n, _parts(samples, config.norm_std_type))
    return rewards_n


def _parts(samples: ScoredSamples, scope: str) -> tuple[Members, ...]:
    """Return the samples normalised together; a batch is the step's samples of one domain."""
    return samples.groups if scope == "group" else samples.domains


REINFORCE = Estimator("reinforce", _rewards)
