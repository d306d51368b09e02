"""Causal attention in plain PyTorch, for padded and packed rows and for context parallelism.

Replaces TransformerEngine if it is not installed. Packed rows and context parallelism build a T x T mask, so it is
meant for the CPU and for tests; plain padded rows use PyTorch's causal kernels. Shape legend: s local positions, t keys
of all context-parallel ranks, b rows, h heads, d head size (values and keys may differ in it).
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig

from roll_r3.batch.token_map import zigzag_positions


class TorchCoreAttention(MegatronModule):
    """Megatron's `core_attention` slot; attention between sequences of a packed row is masked out."""

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: Any,
        attention_type: str,
        attention_dropout: float | None = None,
        softmax_scale: float | None = None,
        cp_comm_type: str | None = None,
        pg_collection: Any = None,
        k_channels: int | None = None,
        v_channels: int | None = None,
    ) -> None:
        super().__init__(config=config)
        assert config.kv_channels is not None
        self.cp_group = pg_collection.cp if pg_collection is not None else parallel_state.get_context_parallel_group()
        self.softmax_scale = softmax_scale or 1.0 / math.sqrt(config.kv_channels)

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        attn_mask_type: Any = None,
        attention_bias: torch.Tensor | None = None,
        packed_seq_params: PackedSeqParams | None = None,
    ) -> torch.Tensor:
        """[s, b, h, d] -> [s, b, h * d], or packed [s, h, d] -> [s, h * d]."""
        packed = packed_seq_params is not None
        if packed:
            query, key, value = (x.unsqueeze(1) for x in (query, key, value))
        cp_size = self.cp_group.size()
        if cp_size > 1:
            both = gather_from_sequence_parallel_region(
                torch.cat([key, value], dim=-1), tensor_parallel_output_grad=True, group=self.cp_group
            )
            key, value = both.split([key.size(-1), value.size(-1)], dim=-1)
        mask = None
        if packed or cp_size > 1:
            bounds = packed_seq_params.cu_seqlens_q_padded.tolist() if packed_seq_params else [0, key.size(0)]
            mask = _causal_mask(tuple(bounds), cp_size, self.cp_group.rank()).to(query.device)
        query, key, value = (x.permute(1, 2, 0, 3) for x in (query, key, value))
        out = F.scaled_dot_product_attention(
            query, key, value, attn_mask=mask, is_causal=mask is None, scale=self.softmax_scale, enable_gqa=True
        )
        out = out.permute(2, 0, 1, 3).flatten(2)  # [s, b, h * d]
        return (out.squeeze(1) if packed else out).contiguous()


@lru_cache(maxsize=32)
def _causal_mask(cu_seqlens: tuple[int, ...], cp_size: int, cp_rank: int) -> torch.Tensor:
    """Mask, True if a local query (row) sees a gathered key (column): same sequence, not later. bool [s, t]

    Keys are ordered by rank, each rank in its zig-zag order.
    """

    def index(rank: int) -> np.ndarray:
        starts, ends = cu_seqlens[:-1], cu_seqlens[1:]
        return np.concatenate([s + zigzag_positions(e - s, cp_size, rank) for s, e in zip(starts, ends, strict=True)])

    keys = np.concatenate([index(rank) for rank in range(cp_size)])
    queries = index(cp_rank)
    sequence_of_key = np.searchsorted(cu_seqlens, keys, side="right")
    sequence_of_query = np.searchsorted(cu_seqlens, queries, side="right")
    visible = (sequence_of_query[:, None] == sequence_of_key) & (keys <= queries[:, None])
    return torch.from_numpy(visible)
