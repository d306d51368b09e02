"""Metrics of an evaluation: mean score, pass@k, majority, lengths."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import comb

import numpy as np

from roll_r3.rewards.final_answer import final_answer

RIGHT = 1.0 - 1e-6
"""Lowest score of a right response: 1, less a rounding error of weighted sums."""
_LEAST_VOTES = 3
"""Fewest responses with a majority worth its name."""


@dataclass(frozen=True)
class EvaluatedSample:
    """Response to a prompt of an evaluation."""

    set: str
    """Name of the set."""
    prompt_id: str
    sample: int
    """Number of the response among those to its prompt, from 0."""
    domain: str
    """Name of the first section of `rewards` that scores the prompt's domain."""
    prompt: str
    response: str
    ground_truth: str
    score: float | None
    """None: the reward rule failed."""
    finish_reason: str
    response_length: int
    """Number of tokens, end token included."""


def pass_at_k(samples: int, right: int, k: int) -> float:
    """Return the unbiased estimate of the chance of a right one among k samples: 1 - C(n - c, k) / C(n, k).

    Source: Chen et al., arXiv 2107.03374, equation 1. `samples` is n, at least k; `right` is c.
    """
    return 1.0 - comb(samples - right, k) / comb(samples, k)


def powers_of_two(most: int) -> list[int]:
    """Return 1, 2, 4 ... below `most`, and `most` itself."""
    return [*(1 << i for i in range((most - 1).bit_length())), most]


def set_metrics(
    prefix: str, prompts: Sequence[Sequence[EvaluatedSample]], *, samples_per_prompt: int, dropped: int
) -> dict[str, float]:
    """Return metric name -> value of some prompts.

    Responses without a score are left out of everything but `failed`.

    Args:
        prefix: beginning of the names.
        prompts: responses to each prompt, in their order.
        samples_per_prompt: number of requested responses.
        dropped: number of responses dropped by the engines.
    """
    scored = [[s for s in samples if s.score is not None] for samples in prompts]
    found = [s for samples in scored for s in samples]
    failed = sum(map(len, prompts)) - len(found)
    metrics = {"prompts": float(len(prompts)), "failed": float(dropped + failed)}
    if found:
        lengths = np.array([s.response_length for s in found])
        metrics |= {
            f"avg@{samples_per_prompt}": float(np.mean([s.score for s in found])),
            "truncated_ratio": float(np.mean([s.finish_reason == "length" for s in found])),
            "response_length/mean": float(lengths.mean()),
            "response_length/max": float(lengths.max()),
            "response_length/min": float(lengths.min()),
        }
        for k in powers_of_two(samples_per_prompt):
            if enough := [samples for samples in scored if len(samples) >= k]:
                metrics[f"pass@{k}"] = float(np.mean([pass_at_k(len(s), _num_right(s), k) for s in enough]))
        if samples_per_prompt >= _LEAST_VOTES:
            metrics[f"maj@{samples_per_prompt}"] = float(np.mean([majority_is_right(s) for s in scored if s]))
    return {f"{prefix}/{name}": value for name, value in metrics.items()}


def majority_is_right(samples: Sequence[EvaluatedSample]) -> bool:
    """Return True if the most frequent final answer is right; of equally frequent ones the earliest counts.

    Its first response decides, since a rule may score one answer in several ways.
    """
    answers = [final_answer(sample.response) for sample in samples]
    answer, _ = Counter(answers).most_common(1)[0]  # in the order of first occurrence
    return _is_right(samples[answers.index(answer)])


def _num_right(samples: Iterable[EvaluatedSample]) -> int:
    return sum(map(_is_right, samples))


def _is_right(sample: EvaluatedSample) -> bool:
    return sample.score is not None and sample.score >= RIGHT
