"""A micro-batch as one rank sees it: its samples, and the token map that lays them out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.packed_seq_params import PackedSeqParams

from roll_r3.batch.batch import Batch
from roll_r3.batch.micro_batch import by_token_budget
from roll_r3.batch.token_map import Layout, TokenMap, build_token_map, round_up

IntArray = npt.NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class MicroBatch:
    """Samples that go through the model together."""

    batch: Batch
    samples: IntArray
    """Which of the batch that was cut."""
    tokens: TokenMap
    """Of this rank."""
    pad_to: int = 0
    """What the map was padded to (see `build_token_map`); the maps of other ranks need it."""
    counted: bool = True
    """False for a repeat that only fills the schedule: its results are thrown away, and nothing is learnt from it."""

    def tensor(self, values_N: npt.NDArray[np.generic], fill: float | int | bool, device: torch.device) -> torch.Tensor:
        """This rank's view of a jagged array. [B, S]"""
        return torch.from_numpy(self.tokens.gather(values_N, fill)).to(device, non_blocking=True)

    def model_inputs(self, device: torch.device) -> dict[str, Any]:
        """Arguments of GPTModel.forward. No attention mask: layers are causal, padding lies at the right."""
        return {
            "input_ids": self.tensor(self.batch.input_ids_N, 0, device),
            "position_ids": torch.from_numpy(self.tokens.positions_BS).to(device, non_blocking=True),
            "attention_mask": None,
            "packed_seq_params": self._packed_seq_params(device),
        }

    def _packed_seq_params(self, device: torch.device) -> PackedSeqParams | None:
        if self.tokens.cu_seqlens is None:
            return None
        cu_seqlens = torch.from_numpy(self.tokens.cu_seqlens).to(device)
        longest = int(np.diff(self.tokens.cu_seqlens).max())
        return PackedSeqParams(
            qkv_format="thd",
            cu_seqlens_q=cu_seqlens,
            cu_seqlens_kv=cu_seqlens,
            cu_seqlens_q_padded=cu_seqlens,
            cu_seqlens_kv_padded=cu_seqlens,
            max_seqlen_q=longest,
            max_seqlen_kv=longest,
        )


def groups_within(
    lengths_n: IntArray, max_tokens: int, layout: Layout, *, dp_size: int, multiple: int
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
    needed = torch.tensor(len(groups), device=torch.cuda.current_device())
    if dp_size > 1:
        dist.all_reduce(needed, dist.ReduceOp.MAX, group=parallel_state.get_data_parallel_group())
    number = round_up(int(needed), multiple)
    return by_token_budget(lengths_n, max_tokens, layout.alignment, packed=layout.packed, at_least=number), number


def cut(batch: Batch, groups: Sequence[IntArray], layout: Layout, *, same_width: bool = False) -> list[MicroBatch]:
    """The micro-batches of the given samples, laid out for this rank.

    Args:
        groups: samples of each micro-batch.
        same_width: pad micro-batch i to one size on all data-parallel ranks (collective over them).
    """
    parts = [batch.select(group) for group in groups]
    widths = [0] * len(parts)
    if same_width:
        widest = torch.tensor([_width(part, layout) for part in parts], device=torch.cuda.current_device())
        dist.all_reduce(widest, dist.ReduceOp.MAX, group=parallel_state.get_data_parallel_group())
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
