"""Advantages of whole responses. Shape legend: n samples."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from roll_r3.config.pipeline import RLVRConfig

EPSILON = 1e-6
"""Added to a group's standard deviation, so that a group of equal rewards has advantage 0."""


def response_advantages(
    scores_n: npt.NDArray[np.float64], groups: Sequence[str], config: RLVRConfig
) -> npt.NDArray[np.float32]:
    """One advantage per sample.

    grpo: (score - mean of its group) / (standard deviation of its group + 1e-6), Shao et al. 2024 (arXiv 2402.03300),
    with the sample deviation (n - 1); without the division it is Dr. GRPO's (Liu et al. 2025, arXiv 2503.20783).
    reinforce: score - mean of the batch. A group of one sample has advantage 0 under grpo.

    Args:
        scores_n: rewards, KL penalty included where it is on.
        groups: which prompt each sample answers.

    Returns:
        float32 [n], clipped to `advantage_clip`.
    """
    if config.adv_estimator == "reinforce":
        advantages = scores_n - scores_n.mean()
    else:
        advantages = np.zeros_like(scores_n)
        _, index_n = np.unique(np.asarray(groups), return_inverse=True)
        for group in range(index_n.max() + 1):
            members = np.flatnonzero(index_n == group)
            centred = scores_n[members] - scores_n[members].mean()
            if config.norm_adv_by_std_in_grpo and len(members) > 1:
                centred = centred / (scores_n[members].std(ddof=1) + EPSILON)
            advantages[members] = centred
    if config.advantage_clip is not None:
        advantages = np.clip(advantages, -config.advantage_clip, config.advantage_clip)
    return advantages.astype(np.float32)
