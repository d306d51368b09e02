"""Samples of several domains for tests of advantages: unequal groups and lengths, prompts, fillers."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from roll_r3.algorithms.advantages import TokenAdvantages, token_advantages
from roll_r3.algorithms.sample_masks import mask_samples
from roll_r3.batch.batch import Batch
from roll_r3.config.algorithm import AlgorithmConfig
from roll_r3.config.derived import algorithm_of
from roll_r3.config.pipeline import RLVRConfig

FILLERS = 3


def config(**changes: Any) -> AlgorithmConfig:
    return algorithm_of(RLVRConfig(exp_name="t", pretrain="x", actor_train={}, actor_infer={}, **changes))


@dataclass(frozen=True)
class Sample:
    """One response, by plain numbers."""

    score: float
    group: str
    domain: str
    prompt: int
    """Tokens."""
    length: int
    """Tokens of the response."""
    truncated: bool
    log_probs: list[float]
    """One per token of the response."""
    ref_log_probs: list[float]


def samples(seed: int, *, groups: int = 6, size: int = 4, drop: bool = True) -> list[Sample]:
    """Return groups of this size in two domains, the second twice as frequent; `drop` removes every seventh sample."""
    random = np.random.default_rng(seed)
    made = []
    for group in range(groups):
        domain, right = ("math", "code")[group % 3 > 0], random.random()
        for _ in range(size):
            length = int(random.integers(1, 9))
            old = -random.random(length) * 3
            made.append(
                Sample(
                    score=float(random.choice([0.0, 0.5, 1.0], p=[1 - right, right / 2, right / 2])),
                    group=f"g{group}",
                    domain=domain,
                    prompt=int(random.integers(1, 4)),
                    length=length,
                    truncated=length == 8,
                    log_probs=np.float32(old).tolist(),
                    ref_log_probs=np.float32(old + random.normal(size=length)).tolist(),
                )
            )
    return [sample for i, sample in enumerate(made) if i % 7 or not drop]


def batch_of(chosen: list[Sample], fillers: int = FILLERS) -> Batch:
    """Return the samples in training form, and fillers."""

    def inputs(which: str) -> np.ndarray:
        parts = [[0.0] * (s.prompt - 1) + getattr(s, which) for s in chosen]
        return np.concatenate(parts).astype(np.float32)

    trained = [np.arange(s.prompt - 1 + s.length) >= s.prompt - 1 for s in chosen]
    zeros = np.zeros(sum(map(len, trained)), np.int64)
    batch = Batch(
        sample_ids=tuple(f"{s.group}/{i}" for i, s in enumerate(chosen)),
        lengths_n=np.array([len(mask) for mask in trained]),
        input_ids_N=zeros,
        labels_N=zeros,
        loss_mask_N=np.concatenate(trained),
        rollout_log_probs_N=inputs("log_probs"),
        old_log_probs_N=inputs("log_probs"),
        ref_log_probs_N=inputs("ref_log_probs"),
    )
    return batch.filled_up(len(chosen) + fillers) if fillers else batch


def computed(chosen: list[Sample], c: AlgorithmConfig, fillers: int = FILLERS) -> tuple[Batch, TokenAdvantages]:
    """Return the masked batch, and what the code under test makes of it."""
    scores_n, groups = np.array([s.score for s in chosen]), [s.group for s in chosen]
    batch, _ = mask_samples(batch_of(chosen, fillers), scores_n, groups, [s.truncated for s in chosen], c)
    found = token_advantages(batch, scores_n, groups, [s.domain for s in chosen], c)
    return replace(batch, advantages_N=found.advantages_N), found
