"""Shaped scores, by hand."""

from __future__ import annotations

import numpy as np
import pytest

from roll_r3.algorithms.shaping import shaped_scores
from tests.unit.algorithms.advantage_samples import config


def test_scores_without_shaping_keep_their_bits_and_give_no_metrics() -> None:
    scores = np.random.default_rng(0).normal(size=20)
    shaped, metrics = shaped_scores(scores, np.arange(20), config(response_length=8))
    np.testing.assert_array_equal(shaped, scores)
    assert metrics == {}


@pytest.mark.parametrize(
    ("length", "penalty"), [(0, 0), (60, 0), (79, 0), (80, 0), (81, 0.05), (90, 0.5), (99, 0.95), (100, 1), (110, 1)]
)
def test_the_penalty_grows_over_the_buffer(length: int, penalty: float) -> None:
    c = config(response_length=100, overlong_buffer={"len": 20})
    for factor in (1.0, 0.4):
        scaled = config(response_length=100, overlong_buffer={"len": 20, "penalty_factor": factor})
        shaped, metrics = shaped_scores(np.array([1.0]), np.array([length]), scaled)
        assert shaped[0] == pytest.approx(1 - factor * penalty)
        assert metrics["reward/overlong_ratio"] == (penalty > 0)
    assert shaped_scores(np.array([0.0]), np.array([length]), c)[0][0] == pytest.approx(-penalty)


def test_the_penalty_is_subtracted_first_then_shifted_then_scaled() -> None:
    c = config(response_length=10, overlong_buffer={"len": 10}, reward_shift=-0.5, reward_scale=4)
    shaped, metrics = shaped_scores(np.array([1.0, 0.0]), np.array([5, 10]), c)
    assert shaped.tolist() == [0.0, -6.0]
    assert metrics == {
        "critic/shaped_score/mean": -3.0,
        "critic/shaped_score/max": 0.0,
        "critic/shaped_score/min": -6.0,
        "reward/overlong_ratio": 1.0,
    }
