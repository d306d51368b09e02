"""Cut a rank's shard into micro-batches, as many on every rank as the schedule needs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import numpy.typing as npt
import torch

from roll_r3.batch.batch import Batch
from roll_r3.batch.data_parallel import DataParallel
from roll_r3.batch.grouping import by_token_budget
from roll_r3.batch.micro_batch import MicroBatch
from roll_r3.batch.token_map import Layout, build_token_map, round_up

IntArray = npt.NDArray[np.int64]


def groups_within(
    lengths_n: IntArray, max_tokens: int, layout: Layout, data_parallel: DataParallel, *, multiple: int
) -> tuple[list[IntArray], int]:
    """Samples of each micro-batch under a token budget; collective over data-parallel ranks.

    Ranks that share experts run in step, so all of them take the largest number of micro-batches that one needs.

    Args:
        max_tokens: of a micro-batch, padding included, over the context-parallel ranks that share it.
        multiple: their number is one of this (the interleaved schedule asks for that).

    Returns:
        The groups, and the number agreed on: above the number of groups where there are too few samples.
    """
    groups = by_token_budget(lengths_n, max_tokens, layout.alignment, packed=layout.packed)
    number = round_up(most(len(groups), data_parallel), multiple)
    return by_token_budget(lengths_n, max_tokens, layout.alignment, packed=layout.packed, at_least=number), number


def most(number: int, data_parallel: DataParallel) -> int:
    """The largest number that a data-parallel rank gives; collective over them."""
    largest = torch.tensor(number, device=data_parallel.device)
    data_parallel.reduce(largest, "max")
    return int(largest)


def cut(
    batch: Batch, groups: Sequence[IntArray], layout: Layout, *, same_width_on: DataParallel | None = None
) -> list[MicroBatch]:
    """The micro-batches of the given samples, laid out for this rank.

    Args:
        groups: samples of each micro-batch.
        same_width_on: pad micro-batch i to one size on all these ranks (collective over them); None: each to its own.
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
    """Tokens of the longest sample, or of the packed row, over all ranks that share it."""
    whole = build_token_map(part.lengths_n, layout)
    return int(whole.cu_seqlens[-1]) if whole.cu_seqlens is not None else whole.slots_BS.shape[1] * layout.cp_size


def fill_up(micro_batches: list[MicroBatch], number: int) -> list[MicroBatch]:
    """Repeat micro-batches, uncounted, until there are `number`: the last first, the smallest under a token budget."""
    missing = number - len(micro_batches)
    repeats = [replace(micro_batches[-1 - i % len(micro_batches)], counted=False) for i in range(missing)]
    return micro_batches + repeats
