"""Masks of samples: truncated responses, and groups too easy or too hard, train nothing.

Masked samples stay in the batch and in means and deviations of scores, as in ROLL. Shape legend: n samples, N inputs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import numpy.typing as npt

from roll_r3.algorithms.advantages.base import Float64n, members_of
from roll_r3.algorithms.advantages.moments import mean
from roll_r3.batch.batch import Batch
from roll_r3.config.algorithm import AlgorithmConfig

Bool_n = npt.NDArray[np.bool_]


def mask_samples(
    batch: Batch, scores_n: Float64n, groups: Sequence[str], truncated: Sequence[bool], config: AlgorithmConfig
) -> tuple[Batch, dict[str, float]]:
    """Set the loss mask of masked samples to False.

    Args:
        batch: scored samples; fillers may follow.
        scores_n: scores before shaping.
        groups: group of each scored sample.
        truncated: True for each scored sample cut at its length limit.

    Returns:
        (batch, metrics: ROLL's shares of samples kept; none without a mask).
    """
    kept: dict[str, Bool_n] = {}
    if config.max_len_mask:
        kept["actor/max_len_mask_ratio"] = ~np.asarray(truncated, np.bool_)
    if config.difficulty_mask:
        kept["actor/difficulty_mask_ratio"] = _is_between(
            scores_n, groups, config.difficulty_low_threshold, config.difficulty_high_threshold
        )
    if not kept:
        return batch, {}
    kept_n = np.zeros(batch.num_samples, np.bool_)
    kept_n[: len(scores_n)] = np.logical_and.reduce(list(kept.values()))
    used = int(kept_n.sum())
    metrics = {name: float(each.mean()) for name, each in kept.items()} | {
        "actor/final_mask_ratio": used / len(scores_n),
        "actor/samples_used": float(used),
        "actor/samples_total": float(len(scores_n)),
    }
    return replace(batch, loss_mask_N=batch.loss_mask_N & batch.per_sample(kept_n)), metrics


def _is_between(scores_n: Float64n, groups: Sequence[str], low: float, high: float) -> Bool_n:
    """Return True for the samples of groups with a mean score between the bounds, both excluded: bool [n]."""
    between_n = np.zeros(len(scores_n), np.bool_)
    for members in members_of(groups):
        between_n[members] = low < mean(scores_n[members]) < high
    return between_n
