"""The rule `math`: math-verify's judgement."""

from __future__ import annotations

from math_verify import parse, verify


def math(response: str, ground_truth: str) -> float:
    """1 if math-verify finds the response's final answer equal to the ground truth; else 0."""
    # the rule's own time limit is around all of this
    gold = parse(f"${ground_truth}$" if "$" not in ground_truth else ground_truth, parsing_timeout=None)
    return float(verify(gold, parse(response, parsing_timeout=None), timeout_seconds=None))
