"""Rewards of one's own: functions that take by name what they need (see docs/rewards.md)."""

from __future__ import annotations

from typing import Any


def mostly_digits(response: str, ground_truth: str, *, bonus: float = 1.0) -> float:
    """The share of digits in the response, and `bonus` more when it is the ground truth."""
    if not response:
        return 0.0
    share = sum(c.isdigit() for c in response) / len(response)
    return share + bonus * (response == ground_truth)


def within_limits(response: str, row: dict[str, Any], finish_reason: str) -> float:
    """1 for the answer of the row in no more characters than its test case allows; 0 where it was cut off."""
    if finish_reason == "length":
        return 0.0
    return float(response == row["answer"] and len(response) <= row["test"]["longest"])
