"""Learning signal of a step's groups: a group with equal scores has none."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt


def group_signal(scores: npt.NDArray[np.float64], groups: Sequence[str]) -> dict[str, float]:
    """Compute the shares of groups without a signal, and of those all right and all wrong, by metric name.

    A group with equal scores is right if the score is above 0, else wrong. A group of one sample has no signal either,
    as it has no peers. DAPO (arXiv 2503.14476) leaves such groups out of a step.

    Args:
        scores: rewards [n].
        groups: group of each score, n names.
    """
    scores_of: dict[str, set[float]] = {}
    for group, score in zip(groups, scores.tolist(), strict=True):
        scores_of.setdefault(group, set()).add(score)
    equal = [next(iter(found)) for found in scores_of.values() if len(found) == 1]
    total = max(len(scores_of), 1)
    right = sum(score > 0 for score in equal)
    return {
        "reward/groups_without_signal": len(equal) / total,
        "reward/groups_all_right": right / total,
        "reward/groups_all_wrong": (len(equal) - right) / total,
    }
