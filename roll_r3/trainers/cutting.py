"""Micro-batches of a rank's shard, in the number needed by the schedule."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import torch

from roll_r3.batch.batch import Batch
from roll_r3.batch.data_parallel import DataParallel
from roll_r3.batch.grouping import by_token_budget, fixed_size
from roll_r3.batch.micro_batch import MicroBatch
from roll_r3.batch.token_map import Layout, build_token_map, round_up

IntArray = npt.NDArray[np.int64]


@dataclass(frozen=True)
class CutRules:
    """Demands of a backend on the micro-batches of one pass."""

    layout: Layout
    """Layout of the tokens on this rank."""
    multiple: int = 1
    """Their number is a multiple of this; the interleaved schedule passes micro-batches round the stages."""
    always_in_step: bool = False
    """All data-parallel ranks run the same number, also without a token budget."""
    same_width: bool = False
    """Micro-batch i has the same width on all data-parallel ranks, because they exchange tensors of equal shapes."""


def cut_shard(
    batch: Batch, rules: CutRules, data_parallel: DataParallel, *, size: int, max_tokens: int | None
) -> list[MicroBatch]:
    """Cut a shard into micro-batches; collective over data-parallel ranks.

    Args:
        size: samples of a micro-batch, where no budget cuts the shard.
        max_tokens: token budget of a micro-batch (see `groups_within`).
    """
    if max_tokens is None:
        groups = fixed_size(batch.num_samples, size)
        number = _largest(len(groups), data_parallel) if rules.always_in_step else len(groups)
        number = round_up(number, rules.multiple)
    else:
        groups, number = groups_within(
            batch.lengths_n, max_tokens, rules.layout, data_parallel, multiple=rules.multiple
        )
    same_width_on = data_parallel if rules.same_width else None
    return fill_up(cut(batch, groups, rules.layout, same_width_on=same_width_on), number)


def groups_within(
    lengths_n: IntArray, max_tokens: int, layout: Layout, data_parallel: DataParallel, *, multiple: int
) -> tuple[list[IntArray], int]:
    """Return the samples of each micro-batch under a token budget; collective over data-parallel ranks.

    Ranks with a share of the same experts run in step, so all take the largest number needed by one of them.

    Args:
        max_tokens: tokens of a micro-batch, padding included, over its context-parallel ranks.
        multiple: factor of the number of micro-batches.

    Returns:
        The groups, and the agreed number. It is above the number of groups where a rank has too few samples.
    """
    groups = by_token_budget(lengths_n, max_tokens, layout.alignment, packed=layout.packed)
    number = round_up(_largest(len(groups), data_parallel), multiple)
    return by_token_budget(lengths_n, max_tokens, layout.alignment, packed=layout.packed, at_least=number), number


def _largest(number: int, data_parallel: DataParallel) -> int:
    """Return the largest `number` of all data-parallel ranks; collective over them."""
    largest = torch.tensor(number, device=data_parallel.device)
    data_parallel.reduce(largest, "max")
    return int(largest)


def cut(
    batch: Batch, groups: Sequence[IntArray], layout: Layout, *, same_width_on: DataParallel | None = None
) -> list[MicroBatch]:
    """Return the micro-batches of the given samples, laid out for this rank.

    Args:
        groups: samples of each micro-batch.
        same_width_on: pad micro-batch i to one width on all these ranks (collective over them); None: no common width.
    """
    parts = [batch.select(group) for group in groups]
    widths = [0] * len(parts)
    if same_width_on:
        widest = torch.tensor([_width(part, layout) for part in parts], device=same_width_on.device)
        same_width_on.reduce(widest, "max")
        widths = widest.tolist()
    return [
        MicroBatch(part, group, build_token_map(part.lengths_n, layout, pad_to=width), width)
        for part, group, width in zip(parts, groups, widths, strict=True)
    ]


def _width(part: Batch, layout: Layout) -> int:
    """Return the tokens of the longest sample, or of the packed row, over all of its ranks."""
    whole = build_token_map(part.lengths_n, layout)
    return int(whole.cu_seqlens[-1]) if whole.cu_seqlens is not None else whole.slots_BS.shape[1] * layout.cp_size


def fill_up(micro_batches: list[MicroBatch], number: int) -> list[MicroBatch]:
    """Repeat micro-batches, uncounted, up to `number`: the last one first, the smallest under a token budget."""
    missing = number - len(micro_batches)
    repeats = [replace(micro_batches[-1 - i % len(micro_batches)], counted=False) for i in range(missing)]
    return micro_batches + repeats
