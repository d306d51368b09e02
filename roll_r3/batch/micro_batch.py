"""Cutting a batch: data-parallel shards, mini-batches, micro-batches. Indices only, nothing is copied here."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

IntArray = npt.NDArray[np.int64]


def assign_to_ranks(lengths_n: IntArray, num_ranks: int) -> list[IntArray]:
    """Samples of each data-parallel rank: as many on each, with token counts as even as a greedy pass makes them.

    Longest first, each sample goes to the rank with the fewest tokens that still has room; ties to the lower rank,
    so the result depends on the lengths alone. Within a rank the batch's order is kept.

    Raises:
        ValueError: the samples do not divide evenly.
    """
    if len(lengths_n) % num_ranks:
        raise ValueError(f"{len(lengths_n)} samples do not divide over {num_ranks} data-parallel ranks")
    room = len(lengths_n) // num_ranks
    chosen: list[list[int]] = [[] for _ in range(num_ranks)]
    tokens = [0] * num_ranks
    for sample in np.argsort(-lengths_n, kind="stable"):
        rank = min((r for r in range(num_ranks) if len(chosen[r]) < room), key=lambda r: (tokens[r], r))
        chosen[rank].append(int(sample))
        tokens[rank] += int(lengths_n[sample])
    return [np.array(sorted(c), np.int64) for c in chosen]


def fixed_size(num_samples: int, size: int) -> list[IntArray]:
    """Consecutive runs of `size` samples; the last may be shorter."""
    return [np.arange(start, min(start + size, num_samples)) for start in range(0, num_samples, size)]


def shuffled_mini_batches(num_samples: int, size: int, seed: tuple[int, ...]) -> list[IntArray]:
    """One epoch of mini-batches in a random order that `seed` alone decides.

    Every rank of a model-parallel group passes the same seed and so cuts the same mini-batches.

    Raises:
        ValueError: `size` does not divide the samples (a short last mini-batch would step on a noisier gradient).
    """
    if num_samples % size:
        raise ValueError(f"{num_samples} samples do not divide into mini-batches of {size}")
    order = np.random.default_rng(seed).permutation(num_samples)
    return [np.sort(order[i]) for i in fixed_size(num_samples, size)]
