"""Choice of groups with a learning signal, by the scores of their samples (dynamic sampling)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from roll_r3.config.sections import GroupFilter


def passes(scores: Sequence[float], settings: GroupFilter) -> bool:
    """Return True if a group is trained on.

    The bounds are excluded, as in ROLL's query filters. The deviation is the sample deviation (n - 1). It is exactly 0
    where all scores are equal, and where there is one score or none. A group without a score has no mean.

    Args:
        scores: scores by the reward rules, before shaping.
    """
    if settings.kind == "mean":
        return len(scores) > 0 and settings.low < _mean(scores) < settings.high
    deviation = 0.0 if len(set(scores)) < 2 else float(np.std(scores, ddof=1))
    return deviation > settings.low


def _mean(scores: Sequence[float]) -> float:
    """Return the mean, without rounding where all scores are equal."""
    return scores[0] if len(set(scores)) == 1 else float(np.mean(scores))
