"""ROLL's recipe for advantages, whole: masks, norms, clips, KL, whitening, against a slow form on padded tensors.

The reference is written from the steps of ROLL's `get_sample_level_mask`, `reward_postprocess`, `compute_token_reward`
and `compute_advantage`, one number at a time in fp64.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from roll_r3.config.algorithm import AlgorithmConfig
from tests.unit.algorithms.advantage_samples import FILLERS, Sample, computed, config, samples

STOCK: dict[str, Any] = {
    "adv_estimator": "reinforce",
    "norm_mean_type": None,
    "norm_std_type": None,
    "reward_clip": 10.0,
    "whiten_advantages": True,
    "advantage_clip": 2.0,
    "max_len_mask": True,
    "difficulty_mask": True,
    "difficulty_low_threshold": 0.1,
    "difficulty_high_threshold": 0.95,
}
"""The settings of most of ROLL's example files."""
KL = {"add_token_level_kl": True, "init_kl_coef": 0.3}
TOLERANCE = 5e-7
"""Relative; advantages are stored in fp32. Worst error seen: 6e-8."""


def mean(values: list[float]) -> float:
    return sum(values) / len(values)


def deviation(values: list[float]) -> float:
    centre = mean(values)
    return math.sqrt(sum((x - centre) ** 2 for x in values) / (len(values) - 1))


def clamp(value: float, limit: float | None) -> float:
    return value if limit is None else max(-limit, min(limit, value))


def padded_reference(chosen: list[Sample], c: AlgorithmConfig) -> list[list[float]]:
    """Return the advantage of each response token of each sample; domains are computed one after the other."""
    rows: list[list[float]] = [[] for _ in chosen]
    for domain in sorted({s.domain for s in chosen}):
        places = [i for i, s in enumerate(chosen) if s.domain == domain]
        for i, row in zip(places, domain_reference([chosen[i] for i in places], c), strict=True):
            rows[i] = row[: chosen[i].length]
    return rows


def domain_reference(part: list[Sample], c: AlgorithmConfig) -> list[list[float]]:
    """Return a rectangle: one row per sample, padded with the advantages 0 of untrained tokens."""
    width, kept, rewards = max(s.length for s in part), [], []
    for s in part:
        peers = [p.score for p in part if p.group == s.group]
        easy_or_hard = not c.difficulty_low_threshold < mean(peers) < c.difficulty_high_threshold
        kept.append(not (c.max_len_mask and s.truncated) and not (c.difficulty_mask and easy_or_hard))
        scopes = {"group": peers, "batch": [p.score for p in part]}
        norm_mean, norm_std = c.norm_mean_type, c.norm_std_type
        if c.adv_estimator == "grpo":
            norm_mean = norm_std = "group"
        reward = s.score - (0.0 if norm_mean is None else mean(scopes[norm_mean]))
        if norm_std is not None and len(scopes[norm_std]) > 1:
            reward /= deviation(scopes[norm_std]) + 1e-6
        rewards.append(clamp(reward, c.reward_clip))
    mask = [[float(keep and t < s.length) for t in range(width)] for s, keep in zip(part, kept, strict=True)]
    rows = []
    for s, reward, row_mask in zip(part, rewards, mask, strict=True):
        token_rewards = []
        for t in range(width):
            value = reward if t == s.length - 1 else 0.0
            if c.add_token_level_kl and t < s.length:
                value -= c.init_kl_coef * (s.log_probs[t] - s.ref_log_probs[t])
            token_rewards.append(clamp(value, c.reward_clip) * row_mask[t])
        rows.append([sum(token_rewards[t:]) for t in range(width)])
    trained = [a for row, row_mask in zip(rows, mask, strict=True) for a, m in zip(row, row_mask, strict=True) if m]
    if c.whiten_advantages and len(trained) > 1:
        centre, scale = mean(trained), 1 / math.sqrt(deviation(trained) ** 2 + 1e-8)
        rows = [[(a - centre) * scale for a in row] for row in rows]
    return [
        [clamp(a * m, c.advantage_clip) for a, m in zip(row, row_mask, strict=True)]
        for row, row_mask in zip(rows, mask, strict=True)
    ]


@pytest.mark.parametrize(
    "changes",
    [
        {},
        KL,
        {**KL, "reward_clip": 0.4},
        {"norm_mean_type": "batch", "norm_std_type": "batch"},
        {"norm_mean_type": "group", "norm_std_type": "batch", **KL},
        {"norm_mean_type": "group", "norm_std_type": "group", "reward_clip": 1.0},
        {"adv_estimator": "grpo", **KL},
        {"whiten_advantages": False, "max_len_mask": False},
    ],
    ids=["stock", "kl", "kl-clipped", "batch-batch", "group-batch", "group-group", "grpo", "plain"],
)
def test_advantages_are_those_of_rolls_steps(changes: dict[str, Any]) -> None:
    c, worst, clipped, masked = config(**STOCK | changes), 0.0, 0, 0
    for seed in range(20):
        chosen = samples(seed, groups=6 + seed % 3, drop=seed % 2 == 1)
        batch, found = computed(chosen, c)
        advantages = np.split(found.advantages_N, batch.offsets[1:-1])
        assert not any(a.any() for a in advantages[len(chosen) :]), "fillers"
        wanted = padded_reference(chosen, c)
        for s, a, row in zip(chosen, advantages[: -FILLERS or None], wanted, strict=True):
            assert not a[: s.prompt - 1].any()
            scale = np.maximum(1.0, np.abs(row))
            worst = max(worst, float((np.abs(a[s.prompt - 1 :] - row) / scale).max()))
        values = np.concatenate(wanted)
        clipped, masked = clipped + int((np.abs(values) == 2).sum()), masked + int((values == 0).sum())
    print(f"worst error {worst:.1e}, {clipped} clipped, {masked} masked")
    assert worst < TOLERANCE
    assert masked > 100, "the masks had something to do"
    assert clipped or c.reward_clip == 1.0 or not c.whiten_advantages, "so had the clip"
