"""Shaped scores: a penalty of long responses, then shift and scale.

Shape legend: n samples.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from roll_r3.algorithms.advantages.base import Float64n
from roll_r3.config.algorithm import AlgorithmConfig
from roll_r3.config.sections import OverlongBufferConfig


def shaped_scores(
    scores_n: Float64n, lengths_n: npt.NDArray[np.int64], config: AlgorithmConfig
) -> tuple[Float64n, dict[str, float]]:
    """Compute (score - penalty of overlong_buffer + reward_shift) x reward_scale.

    Args:
        lengths_n: sampled tokens of each response.

    Returns:
        (shaped scores, metrics by name; none if nothing is shaped).
    """
    buffer, metrics = config.overlong_buffer, dict[str, float]()
    if buffer is not None:
        penalty_n = _overlong_penalty(lengths_n, config.response_length, buffer)
        scores_n = scores_n - penalty_n
        metrics["reward/overlong_ratio"] = float((penalty_n > 0).mean())
    shaped_n = (scores_n + config.reward_shift) * config.reward_scale
    if buffer is not None or (config.reward_shift, config.reward_scale) != (0.0, 1.0):
        metrics |= {
            f"critic/shaped_score/{name}": float(getattr(np, name)(shaped_n)) for name in ("mean", "max", "min")
        }
    return shaped_n, metrics


def _overlong_penalty(lengths_n: npt.NDArray[np.int64], longest: int, buffer: OverlongBufferConfig) -> Float64n:
    """Compute penalty_factor x clip((length - (longest - len)) / len, 0, 1), from DAPO (arXiv 2503.14476)."""
    overlong_n = (lengths_n - (longest - buffer.len)) / buffer.len
    penalty_n: Float64n = buffer.penalty_factor * np.clip(overlong_n, 0.0, 1.0)
    return penalty_n
