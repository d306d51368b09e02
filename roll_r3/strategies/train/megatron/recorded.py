"""R2: the routes that this rank's own recording pass saw, kept here and nowhere else.

A rank keeps the layers it holds, for every input of its data-parallel shard: the pieces of the ranks that split a
sequence (context and sequence parallel) are gathered, those of other pipeline stages are not needed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist
from megatron.core import parallel_state

from roll_r3.batch.batch import Batch
from roll_r3.batch.routes import RoutedExperts, route_dtype
from roll_r3.batch.token_map import PADDING, build_token_map
from roll_r3.errors import ReplayError
from roll_r3.strategies.train.megatron.micro_batch import MicroBatch
from roll_r3.strategies.train.megatron.parallel import RankLayout

RouteArray = npt.NDArray[np.unsignedinteger]


class RecordedRoutes:
    """Sample id -> routes of this rank's layers, of the last recording pass."""

    def __init__(self, layout: RankLayout, packed: bool, num_experts: int) -> None:
        self._layout = layout
        self._packed = packed
        self._num_experts = num_experts
        self._samples: dict[str, RoutedExperts] = {}

    def clear(self) -> None:
        self._samples = {}

    def store(self, micro_batches: Sequence[MicroBatch], chosen: Sequence[torch.Tensor]) -> None:
        """Keep what a recording pass chose; collective over the ranks that split a sequence.

        Args:
            chosen: of each micro-batch, int64 [L, t, K].
        """
        for micro, ids_LtK in zip(micro_batches, chosen, strict=True):
            if not micro.counted:
                continue
            ids_LNK = self._whole(micro, ids_LtK)
            offsets = micro.batch.offsets
            for i, sample_id in enumerate(micro.batch.sample_ids):
                self._samples[sample_id] = RoutedExperts(ids_LNK[:, offsets[i] : offsets[i + 1]].copy())

    def attach(self, batch: Batch) -> Batch:
        """The batch with its recorded routes.

        Raises:
            ReplayError: a sample that the last recording pass did not see.
        """
        missing = [sample_id for sample_id in batch.sample_ids if sample_id not in self._samples]
        if missing:
            raise ReplayError(
                f"R2 replays the routes of the recording pass, but {len(missing)} of {batch.num_samples} samples were "
                f"not in it (the first is {missing[0]}): call compute_log_probs on the same samples before train_step"
            )
        return replace(batch, routes=tuple(self._samples[sample_id] for sample_id in batch.sample_ids))

    def _whole(self, micro: MicroBatch, ids_LtK: torch.Tensor) -> RouteArray:
        """This rank's layers, all inputs of the micro-batch. [L, N, K]"""
        ids_LNK = np.zeros((len(ids_LtK), micro.tokens.num_inputs, ids_LtK.size(-1)), route_dtype(self._num_experts))
        if not len(ids_LtK):
            return ids_LNK
        # of the unsigned 16-bit integers torch and the backends know too little
        sent = ids_LtK.to(torch.uint8 if self._num_experts <= 1 << 8 else torch.int32).contiguous()
        layout = self._layout
        pieces = _gather(sent, parallel_state.get_tensor_model_parallel_group(), layout.sp_size)
        pieces = [
            piece
            for part in pieces
            for piece in _gather(part, parallel_state.get_context_parallel_group(), layout.cp_size)
        ]
        places = [(cp, sp) for sp in range(layout.sp_size) for cp in range(layout.cp_size)]
        for (cp_rank, sp_rank), piece in zip(places, pieces, strict=True):
            token_layout = layout.token_layout(self._packed, cp_rank=cp_rank, sp_rank=sp_rank)
            slots_t = build_token_map(micro.batch.lengths_n, token_layout, pad_to=micro.pad_to).router_slots_t
            held = slots_t != PADDING
            ids_LNK[:, slots_t[held]] = piece.cpu().numpy()[:, held]
        return ids_LNK


def _gather(tensor: torch.Tensor, group: dist.ProcessGroup, size: int) -> list[torch.Tensor]:
    """Every rank's tensor, in rank order."""
    if size == 1:
        return [tensor]
    parts = [torch.empty_like(tensor) for _ in range(size)]
    dist.all_gather(parts, tensor, group=group)
    return parts
