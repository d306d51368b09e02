"""A reward that takes its time, so that a run can be found at it."""

from __future__ import annotations

import time

from roll_r3.rewards.rules import exact_match


def exact_match_slowly(response: str, ground_truth: str) -> float:
    """As `exact_match`, in 10 ms."""
    time.sleep(0.01)
    return exact_match(response, ground_truth)
