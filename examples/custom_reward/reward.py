"""Custom reward rules: functions whose parameters are filled by name (see docs/rewards.md)."""

from __future__ import annotations

from typing import Any


def mostly_digits(response: str, ground_truth: str, *, bonus: float = 1.0) -> float:
    """Return the share of digits in the response, plus `bonus` if it is the ground truth."""
    if not response:
        return 0.0
    share = sum(c.isdigit() for c in response) / len(response)
    return share + bonus * (response == ground_truth)


def within_limits(response: str, row: dict[str, Any], finish_reason: str) -> float:
    """Return 1 for the row's answer within the length of its test case; 0 if truncated."""
    if finish_reason == "length":
        return 0.0
    return float(response == row["answer"] and len(response) <= row["test"]["longest"])
