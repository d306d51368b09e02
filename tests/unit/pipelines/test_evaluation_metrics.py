"""pass@k against enumeration, majority, and metrics of a set."""

from __future__ import annotations

from itertools import combinations

import pytest

from roll_r3.pipelines.evaluation_metrics import (
    EvaluatedSample,
    majority_is_right,
    pass_at_k,
    powers_of_two,
    set_metrics,
)
from roll_r3.tracking.names import declared_order


def sample(response: str, score: float | None, *, number: int = 0, finish: str = "stop", length: int = 3):
    return EvaluatedSample("s", "p", number, "d", "q", response, "1", score, finish, length)


@pytest.mark.parametrize("n", [1, 3, 6])
def test_pass_at_k_is_the_share_of_choices_with_a_right_one(n: int) -> None:
    for right in range(n + 1):
        for k in range(1, n + 1):
            choices = list(combinations([True] * right + [False] * (n - right), k))
            assert pass_at_k(n, right, k) == pytest.approx(sum(map(any, choices)) / len(choices), abs=1e-15)


def test_k_doubles_up_to_the_number_of_samples() -> None:
    assert [powers_of_two(n) for n in (1, 2, 3, 4, 6, 8)] == [
        [1],
        [1, 2],
        [1, 2, 3],
        [1, 2, 4],
        [1, 2, 4, 6],
        [1, 2, 4, 8],
    ]


def test_the_most_frequent_answer_decides_and_the_earliest_of_a_tie() -> None:
    a, b = (sample("so\n1", 1.0), sample("2", 0.0))
    assert majority_is_right([b, a, a])
    assert not majority_is_right([b, a, b])
    assert majority_is_right([a, b])
    assert not majority_is_right([b, a, a, b])


def test_metrics_of_a_set() -> None:
    prompts = [
        [sample("1", 1.0), sample("1", 1.0, length=5), sample("2", 0.25), sample("1", None)],
        [sample("2", 0.0, finish="length", length=8), sample("3", 0.0), sample("3", 0.0)],
        [],
    ]
    metrics = set_metrics("val/x", prompts, samples_per_prompt=4, dropped=5)
    assert metrics == {
        "val/x/prompts": 3,
        "val/x/failed": 6,
        "val/x/avg@4": pytest.approx(2.25 / 6),
        "val/x/truncated_ratio": pytest.approx(1 / 6),
        "val/x/response_length/mean": pytest.approx(25 / 6),
        "val/x/response_length/max": 8,
        "val/x/response_length/min": 3,
        "val/x/pass@1": pytest.approx((2 / 3 + 0) / 2),  # partly right is not right
        "val/x/pass@2": pytest.approx(1 / 2),
        "val/x/maj@4": 0.5,
    }
    assert declared_order(metrics)[1] == []
    assert set_metrics("val/x", [[]], samples_per_prompt=1, dropped=1) == {"val/x/prompts": 1, "val/x/failed": 1}
