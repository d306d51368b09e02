"""Number of micro-batches held by a pipeline stage at once, by simulating megatron-core's schedules.

1F1B and its interleaved form: Narayanan et al. 2021, arXiv 2104.04473, section 2.2.
"""

from __future__ import annotations

from collections.abc import Sequence


def in_flight(stage: int, stages: int, weights: Sequence[int], micro_batches: int) -> tuple[int, ...]:
    """Return the number of micro-batches between forward and backward in each chunk, at the moment of the largest sum.

    Args:
        weights: weight of one micro-batch in each chunk.
        micro_batches: number in an optimizer step; with several chunks a multiple of `stages`.
    """
    chunks = len(weights)
    total = micro_batches * chunks
    if chunks == 1:
        return (min(micro_batches, stages - stage),)
    # groups of `stages` micro-batches go through one chunk after the other
    forward = [position // stages % chunks for position in range(total)]
    warm_up = min(total, 2 * (stages - stage - 1) + (chunks - 1) * stages)
    held = [0] * chunks
    heaviest: tuple[int, ...] = tuple(held)
    for position in range(total):
        held[forward[position]] += 1
        if _weight(held, weights) > _weight(heaviest, weights):
            heaviest = tuple(held)
        if position >= warm_up:
            held[chunks - 1 - forward[position - warm_up]] -= 1
    return heaviest


def _weight(held: Sequence[int], weights: Sequence[int]) -> int:
    return sum(number * weight for number, weight in zip(held, weights, strict=True))
