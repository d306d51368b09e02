"""R2: the routes that this rank's own recording pass saw, kept here and nowhere else.

A rank keeps the layers it holds, for every input of its data-parallel shard: the pieces of the ranks that split a
sequence (context and sequence parallel) are gathered, those of other pipeline stages are not needed. When a sample is
trained on another data-parallel rank than recorded it, its rows follow it there, straight from rank to rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from math import prod
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist
from megatron.core import parallel_state

from roll_r3.batch.batch import Batch
from roll_r3.batch.routes import RoutedExperts, route_dtype
from roll_r3.batch.token_map import PADDING, Layout, build_token_map
from roll_r3.errors import ReplayError
from roll_r3.strategies.train.megatron.micro_batch import MicroBatch
from roll_r3.strategies.train.megatron.parallel import RankLayout

RouteArray = npt.NDArray[np.unsignedinteger]


class RecordedRoutes:
    """Sample id -> routes of this rank's layers, of the last recording pass."""

    def __init__(self, layout: RankLayout, tokens: Layout, num_experts: int) -> None:
        """
        Args:
            tokens: how this rank lays out a micro-batch.
        """
        self._layout = layout
        self._tokens = tokens
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
        """The batch with its recorded routes; collective over data-parallel ranks.

        Rows stay where they are. Those that this rank lacks come from the data-parallel rank that recorded them (it
        holds the same layers), each once; where no rank lacks any, only a count is exchanged.

        Raises:
            ReplayError: a sample that the last recording pass saw on no rank; on every rank alike.
        """
        missing = [sample_id for sample_id in dict.fromkeys(batch.sample_ids) if sample_id not in self._samples]
        # numbers of this rank; the sums over all of them decide, so that no rank waits for another that raised
        lacking, samples = self._summed(len(missing), batch.num_samples)
        if lacking:
            self._fetch(missing, samples)
        return replace(batch, routes=tuple(self._samples[sample_id] for sample_id in batch.sample_ids))

    def _summed(self, *counts: int) -> list[int]:
        """Each count's sum over data-parallel ranks."""
        if self._layout.dp_size == 1:
            return list(counts)
        total = torch.tensor(counts, device=torch.cuda.current_device())
        dist.all_reduce(total, group=parallel_state.get_data_parallel_group())
        return [int(count) for count in total.tolist()]

    def _fetch(self, missing: Sequence[str], num_samples: int) -> None:
        """Bring the rows of `missing` here, and send what other ranks lack; collective over data-parallel ranks."""
        size, own = self._layout.dp_size, self._layout.dp_rank
        wanted_by = _gather_objects(list(missing), size)
        wanted = dict.fromkeys(sample_id for ids in wanted_by for sample_id in ids)
        held = {sample_id: self._samples[sample_id].ids_MRK.shape for sample_id in wanted if sample_id in self._samples}
        held_by = _gather_objects(held, size)
        source = {sample_id: rank for rank in reversed(range(size)) for sample_id in held_by[rank]}
        lost = [sample_id for sample_id in wanted if sample_id not in source]
        if lost:
            raise ReplayError(
                f"R2 replays the routes of the recording pass, but {len(lost)} of {num_samples} samples were not in "
                f"it (the first is {lost[0]}): call compute_log_probs on the same samples before train_step"
            )
        to_send = [
            [self._samples[sample_id].ids_MRK.reshape(-1) for sample_id in ids if source[sample_id] == own]
            for ids in wanted_by
        ]
        to_get = [[sample_id for sample_id in missing if source[sample_id] == rank] for rank in range(size)]
        incoming = [(sample_id, held_by[rank][sample_id]) for rank, ids in enumerate(to_get) for sample_id in ids]
        entries = [sum(prod(held_by[rank][sample_id]) for sample_id in ids) for rank, ids in enumerate(to_get)]
        received = _exchange(to_send, entries, route_dtype(self._num_experts))
        ends = np.cumsum([prod(shape) for _, shape in incoming])[:-1]
        for (sample_id, shape), ids in zip(incoming, np.split(received, ends), strict=False):
            self._samples[sample_id] = RoutedExperts(ids.reshape(shape).copy())

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
            token_layout = replace(self._tokens, cp_rank=cp_rank, sp_rank=sp_rank)
            slots_t = build_token_map(micro.batch.lengths_n, token_layout, pad_to=micro.pad_to).router_slots_t
            held = slots_t != PADDING
            ids_LNK[:, slots_t[held]] = piece.cpu().numpy()[:, held]
        return ids_LNK


def _gather_objects(value: Any, size: int) -> list[Any]:
    """The value of every data-parallel rank, in rank order."""
    if size == 1:
        return [value]
    values: list[Any] = [None] * size
    dist.all_gather_object(values, value, group=parallel_state.get_data_parallel_group())
    return values


def _exchange(to_send: Sequence[Sequence[RouteArray]], entries: Sequence[int], dtype: np.dtype[Any]) -> RouteArray:
    """Each data-parallel rank's arrays, sent to it alone.

    Args:
        to_send: of each rank, arrays [x].
        entries: how many come from each rank.

    Returns:
        What came, rank after rank. [sum(entries)]
    """
    nothing = np.zeros(0, dtype)
    # as bytes: of the unsigned 16-bit integers torch and the backends know too little
    parts = [np.concatenate([nothing, *arrays]).view(np.uint8) for arrays in to_send]
    sizes = [count * dtype.itemsize for count in entries]
    device = torch.cuda.current_device()
    received = torch.empty(sum(sizes), dtype=torch.uint8, device=device)
    dist.all_to_all_single(
        received,
        torch.from_numpy(np.concatenate(parts)).to(device),
        sizes,
        [len(part) for part in parts],
        group=parallel_state.get_data_parallel_group(),
    )
    return received.cpu().numpy().view(dtype)


def _gather(tensor: torch.Tensor, group: dist.ProcessGroup, size: int) -> list[torch.Tensor]:
    """Every rank's tensor, in rank order."""
    if size == 1:
        return [tensor]
    parts = [torch.empty_like(tensor) for _ in range(size)]
    dist.all_gather(parts, tensor, group=group)
    return parts
