"""Masks of samples, by hand."""

from __future__ import annotations

import numpy as np
import pytest

from roll_r3.algorithms.sample_masks import mask_samples
from tests.unit.algorithms.advantage_samples import batch_of, config, samples

FILLERS = 2


def trained(scores: list[float], groups: str, truncated: list[int], **changes: object) -> tuple[list[bool], dict]:
    """Return the samples left with trained tokens, and the metrics."""
    chosen = samples(0, groups=4, drop=False)[: len(scores)]
    before = batch_of(chosen, FILLERS)
    batch, metrics = mask_samples(
        before, np.array(scores), list(groups), [bool(x) for x in truncated], config(**changes)
    )
    tokens, whole = batch.sum_per_sample(batch.loss_mask_N), before.sum_per_sample(before.loss_mask_N)
    assert all(after in (0, all_) for after, all_ in zip(tokens, whole, strict=True)), "whole samples only"
    assert not tokens[len(scores) :].any(), "fillers"
    return [bool(x) for x in tokens[: len(scores)]], metrics


def test_without_a_mask_the_batch_is_the_same_object() -> None:
    batch = batch_of(samples(0))
    assert mask_samples(batch, np.zeros(3), ["a"] * 3, [True] * 3, config()) == (batch, {})


def test_truncated_samples_train_nothing() -> None:
    kept, metrics = trained([1, 0, 0, 1], "aabb", [0, 1, 0, 0], max_len_mask=True)
    assert kept == [True, False, True, True]
    assert metrics == {
        "actor/max_len_mask_ratio": 0.75,
        "actor/final_mask_ratio": 0.75,
        "actor/samples_used": 3,
        "actor/samples_total": 4,
    }


@pytest.mark.parametrize(
    ("thresholds", "kept"),
    [
        ((0.0, 1.0), {"half", "lone"}),
        ((0.5, 1.0), {"lone"}),
        ((0.1, 0.5), set()),
        ((-1.0, 0.75), {"none", "half"}),
        ((0.0, 1.1), {"half", "lone", "all"}),
    ],
)
def test_groups_train_between_the_thresholds_both_excluded(thresholds: tuple[float, float], kept: set[str]) -> None:
    """Groups of any size, apart in the batch; a lone sample is a group with its own score."""
    names = {"n": "none", "h": "half", "l": "lone", "a": "all"}
    groups = "nhnahhnhal"
    scores = [0, 1, 0, 1, 0, 1, 0, 0, 1, 0.75]
    low, high = thresholds
    found, metrics = trained(
        scores, groups, [0] * 10, difficulty_mask=True, difficulty_low_threshold=low, difficulty_high_threshold=high
    )
    assert found == [names[group] in kept for group in groups]
    assert metrics["actor/difficulty_mask_ratio"] == metrics["actor/final_mask_ratio"] == sum(found) / 10


def test_a_group_of_equal_scores_is_at_its_threshold() -> None:
    """Rounding of the mean of 0.1 three times would put it above."""
    settings = {"difficulty_mask": True, "difficulty_low_threshold": 0.1, "difficulty_high_threshold": 0.95}
    assert trained([0.1] * 3, "aaa", [0] * 3, **settings)[0] == [False] * 3


def test_both_masks_count_alone_and_together() -> None:
    kept, metrics = trained([1, 0, 1, 1], "aabb", [1, 0, 1, 0], max_len_mask=True, difficulty_mask=True)
    assert kept == [False, True, False, False]
    assert metrics == {
        "actor/max_len_mask_ratio": 0.5,
        "actor/difficulty_mask_ratio": 0.5,
        "actor/final_mask_ratio": 0.25,
        "actor/samples_used": 1,
        "actor/samples_total": 4,
    }
