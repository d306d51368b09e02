"""Groups without a signal, counted by hand."""

from __future__ import annotations

import numpy as np

from roll_r3.algorithms.signal import group_signal


def test_groups_whose_scores_are_equal_have_no_signal():
    scores = np.array([1.0, 1.0, 0.0, 0.0, 1.0, 0.0, -1.0, -1.0, 0.5])
    groups = ["a", "a", "b", "b", "c", "c", "d", "d", "alone"]
    assert group_signal(scores, groups) == {
        "reward/groups_without_signal": 4 / 5,
        "reward/groups_all_right": 2 / 5,
        "reward/groups_all_wrong": 2 / 5,
    }


def test_a_group_need_not_stand_together():
    assert group_signal(np.array([0.1, 0.3, 0.2]), ["a", "b", "a"])["reward/groups_without_signal"] == 1 / 2
