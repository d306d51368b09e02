"""Exact expectation of the policy gradient over all groups of a small bandit, under each estimator."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest

from roll_r3.algorithms.advantages import token_advantages
from roll_r3.batch.batch import Batch
from tests.unit.algorithms.advantage_samples import config

ARMS, SIZE = 4, 3
REWARDS = np.array([1.0, 0.3, -0.5, 0.0])
LOGITS = np.array([0.2, -0.4, 0.9, 0.1])
SINGLE = 1e-6
"""Relative; advantages are stored in fp32."""


def expected_gradient(**changes: Any) -> np.ndarray:
    """Average the gradient of log-probability x advantage over all 64 groups of 3 one-token responses."""
    policy = np.exp(LOGITS) / np.exp(LOGITS).sum()
    scores = np.eye(ARMS) - policy  # gradient of log p(arm) by the logits
    c, total = config(**changes), np.zeros(ARMS)
    zeros = np.zeros(SIZE, np.int64)
    batch = Batch(("a", "b", "c"), np.ones(SIZE, np.int64), zeros, zeros, zeros == 0, np.zeros(SIZE, np.float32))
    for arms in itertools.product(range(ARMS), repeat=SIZE):
        chosen = list(arms)
        found = token_advantages(batch, REWARDS[chosen], ["g"] * SIZE, ["d"] * SIZE, c)
        total += policy[chosen].prod() * found.advantages_N @ scores[chosen] / SIZE
    return total


def true_gradient() -> np.ndarray:
    policy = np.exp(LOGITS) / np.exp(LOGITS).sum()
    return policy * (REWARDS - policy @ REWARDS)


@pytest.mark.parametrize(
    ("changes", "factor"),
    [
        ({"adv_estimator": "rloo"}, 1),
        ({"adv_estimator": "reinforce", "norm_mean_type": None}, 1),
        ({"adv_estimator": "grpo", "norm_adv_by_std_in_grpo": False}, (SIZE - 1) / SIZE),
        ({"adv_estimator": "reinforce", "norm_mean_type": "group"}, (SIZE - 1) / SIZE),
        ({"adv_estimator": "reinforce", "norm_mean_type": "batch"}, (SIZE - 1) / SIZE),
    ],
)
def test_the_mean_gradient_is_the_true_one(changes: dict[str, Any], factor: float) -> None:
    """A sample in its own baseline shortens the gradient by 1/n, and does not turn it."""
    found, wanted = expected_gradient(**changes), factor * true_gradient()
    assert np.linalg.norm(found - wanted) < SINGLE * np.linalg.norm(wanted)


@pytest.mark.parametrize(
    "changes", [{"adv_estimator": "grpo"}, {"adv_estimator": "reinforce_plus_plus_baseline"}], ids=["grpo", "plus-plus"]
)
def test_a_division_by_the_samples_own_deviation_turns_it(changes: dict[str, Any]) -> None:
    """Known of GRPO (arXiv 2503.20783); whitening does so too, less the larger the batch."""
    found, wanted = expected_gradient(**changes), true_gradient()
    cosine = found @ wanted / np.linalg.norm(found) / np.linalg.norm(wanted)
    assert 0.9 < cosine < 0.999
