"""Cutting a batch into data-parallel shards, mini-batches and micro-batches. Indices only; no data is copied."""

from __future__ import annotations

import heapq
from bisect import bisect_left
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from roll_r3.batch.token_map import round_up

IntArray = npt.NDArray[np.int64]


def assign_to_ranks(lengths_n: IntArray, num_ranks: int) -> list[IntArray]:
    """Samples of each data-parallel rank: equal in number, with token counts balanced by a greedy pass.

    Longest first, each sample goes to the rank with the fewest tokens and room left; ties go to the lower rank. The
    result depends on the lengths alone. Within a rank the batch's order is kept.

    Raises:
        ValueError: the number of samples is not divisible by `num_ranks`.
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
    """Make few, evenly filled micro-batches of at most `max_tokens` each, padding included.

    A padded micro-batch takes its number of rows times the widest, a packed one the sum of its samples, each rounded up
    to the alignment. The result depends on the arguments alone. The largest micro-batch comes first: ranks sharing
    experts then run batches of similar size together. Within a micro-batch, samples ascend.

    Args:
        lengths_n: inputs of each sample.
        max_tokens: maximum per micro-batch, over all ranks sharing it.
        alignment: `Layout.alignment`.
        packed: `Layout.packed`.
        at_least: minimum number of micro-batches. Data-parallel ranks agree on the largest number needed by one of
            them. With fewer samples, there is one micro-batch per sample.

    Raises:
        ValueError: one sample alone exceeds the budget.
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
    """Packed: each sample goes to the group with the fewest tokens, for the smallest sufficient number of groups.

    Samples fitting in k groups fit in k + 1. k is at most twice the bound given by the sum and by the samples over half
    the budget.
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
    """Padded: consecutive runs of the samples by length (an optimal cut), with the smallest widest run."""

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
    """One epoch of mini-batches in a random order, decided by `seed` alone.

    Every rank of a model-parallel group passes the same seed and gets the same mini-batches.

    Raises:
        ValueError: the number of samples is not divisible by `size` (a short last mini-batch would have a noisier
            gradient).
    """
    if num_samples % size:
        raise ValueError(f"{num_samples} samples do not divide into mini-batches of {size}")
    order = np.random.default_rng(seed).permutation(num_samples)
    return [np.sort(order[i]) for i in fixed_size(num_samples, size)]
