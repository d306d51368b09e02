"""A reward of one's own: any function (response, ground_truth, **kwargs) -> float."""

from __future__ import annotations


def mostly_digits(response: str, ground_truth: str, *, bonus: float = 1.0) -> float:
    """The share of digits in the response, and `bonus` more when it is the ground truth."""
    if not response:
        return 0.0
    share = sum(c.isdigit() for c in response) / len(response)
    return share + bonus * (response == ground_truth)
