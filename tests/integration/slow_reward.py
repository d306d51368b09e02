"""Slow reward, for tests of a run in its reward stage."""

from __future__ import annotations

import time

from roll_r3.rewards.rules import exact_match


def exact_match_slowly(response: str, ground_truth: str) -> float:
    """Same as `exact_match`, in 10 ms."""
    time.sleep(0.01)
    return exact_match(response, ground_truth)
