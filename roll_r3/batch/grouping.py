"""Cutting a batch: data-parallel shards, mini-batches, micro-batches. Indices only, nothing is copied here."""

from __future__ import annotations

import heapq
from bisect import bisect_left
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from roll_r3.batch.token_map import round_up

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


def by_token_budget(
    lengths_n: IntArray, max_tokens: int, alignment: int, *, packed: bool, at_least: int = 1
) -> list[IntArray]:
    """Few, evenly filled micro-batches that each take at most `max_tokens`, padding included.

    A padded micro-batch takes its rows times the widest, a packed one the sum of its samples, each rounded up to the
    alignment. The result depends on the arguments alone. The largest micro-batch comes first, so that ranks which share
    experts meet with batches of like size; within one the samples ascend.

    Args:
        lengths_n: inputs of each sample.
        max_tokens: of a micro-batch, over all ranks that share it.
        alignment: `Layout.alignment`.
        packed: `Layout.packed`.
        at_least: so many micro-batches, where fewer would do. Data-parallel ranks agree on the largest number that one
            of them needs. With fewer samples than that there is one micro-batch per sample.

    Raises:
        ValueError: a sample that exceeds the budget alone.
    """
    tokens = [round_up(int(length), alignment) for length in lengths_n]
    for sample, size in enumerate(tokens):
        if size > max_tokens:
            raise ValueError(
                f"sample {sample} has {lengths_n[sample]} inputs and takes {size} tokens (a multiple of {alignment}): "
                f"more than the {max_tokens} of a micro-batch"
            )
    if not tokens:
        return []
    longest_first = sorted(range(len(tokens)), key=lambda sample: (-tokens[sample], sample))
    deal = _even_sums if packed else _even_rows
    groups = deal(tokens, longest_first, max_tokens, min(at_least, len(tokens)))

    def footprint(group: Sequence[int]) -> int:
        return sum(tokens[i] for i in group) if packed else len(group) * max(tokens[i] for i in group)

    groups.sort(key=lambda group: (-footprint(group), min(group)))
    return [np.array(sorted(group), np.int64) for group in groups]


def _even_sums(tokens: list[int], longest_first: list[int], max_tokens: int, at_least: int) -> list[list[int]]:
    """Packed: each sample to the group with the fewest tokens, in the smallest number of groups where that fits.

    What fits in k groups fits in k + 1, and k is at most twice what the sum and the samples over half the budget ask.
    """

    def dealt(num_groups: int) -> list[list[int]]:
        groups: list[list[int]] = [[] for _ in range(num_groups)]
        fill = [(0, group) for group in range(num_groups)]
        for sample in longest_first:
            size, group = fill[0]
            groups[group].append(sample)
            heapq.heapreplace(fill, (size + tokens[sample], group))
        return groups

    def fits(num_groups: int) -> bool:
        return all(sum(tokens[i] for i in group) <= max_tokens for group in dealt(num_groups))

    fewest = max(at_least, -(-sum(tokens) // max_tokens))
    return dealt(fewest + bisect_left(range(fewest, len(tokens)), True, key=fits))


def _even_rows(tokens: list[int], longest_first: list[int], max_tokens: int, at_least: int) -> list[list[int]]:
    """Padded: consecutive runs of the samples by length, which no other cut beats, with the smallest widest run."""

    def runs(budget: int) -> list[list[int]]:
        groups: list[list[int]] = []
        for sample in longest_first:
            if groups and (len(groups[-1]) + 1) * tokens[groups[-1][0]] <= budget:
                groups[-1].append(sample)
            else:
                groups.append([sample])
        return groups

    num_groups = max(at_least, len(runs(max_tokens)))
    narrowest = tokens[longest_first[0]]
    budgets = range(narrowest, max_tokens)
    groups = runs(narrowest + bisect_left(budgets, True, key=lambda budget: len(runs(budget)) <= num_groups))
    while len(groups) < num_groups:  # several samples of one width can leave fewer runs than wanted
        largest = max((g for g in groups if len(g) > 1), key=lambda group: len(group) * tokens[group[0]])
        groups.remove(largest)
        groups += [largest[: len(largest) // 2], largest[len(largest) // 2 :]]
    return groups


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
