"""R2: the routes of this rank's own recording pass, kept in this rank's memory only.

A rank keeps its own layers, for every input of its data-parallel shard. It gathers the pieces of the ranks splitting a
sequence, and needs none of other pipeline stages. If a sample is trained on another data-parallel rank than its
recording rank, its rows follow it, directly from rank to rank.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from math import prod

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist

from roll_r3.batch.batch import Batch
from roll_r3.batch.data_parallel import DataParallel
from roll_r3.batch.micro_batch import MicroBatch
from roll_r3.batch.routes import RoutedExperts, route_dtype
from roll_r3.batch.token_map import PADDING, Layout, build_token_map
from roll_r3.errors import ReplayError

RouteArray = npt.NDArray[np.unsignedinteger]
Pieces = Callable[[torch.Tensor], list[tuple[Layout, torch.Tensor]]]
"""Choices of this rank -> (layout, choices) of each rank sharing its samples; collective over these ranks."""


class RecordedRoutes:
    """Routes of the last recording pass in this rank's layers, by sample id."""

    def __init__(self, data_parallel: DataParallel, pieces: Pieces, num_experts: int) -> None:
        self._data_parallel = data_parallel
        self._pieces = pieces
        self._num_experts = num_experts
        self._samples: dict[str, RoutedExperts] = {}

    def clear(self) -> None:
        self._samples = {}

    def store(self, micro_batches: Sequence[MicroBatch], chosen: Sequence[torch.Tensor]) -> None:
        """Keep the choices of a recording pass; collective over the ranks splitting a sequence.

        Args:
            chosen: choices per micro-batch, int64 [L, t, K].
        """
        for micro, ids_LtK in zip(micro_batches, chosen, strict=True):
            if not micro.counted:
                continue
            ids_LNK = self._whole(micro, ids_LtK)
            offsets = micro.batch.offsets
            for i, sample_id in enumerate(micro.batch.sample_ids):
                self._samples[sample_id] = RoutedExperts(ids_LNK[:, offsets[i] : offsets[i + 1]].copy())

    def attach(self, batch: Batch) -> Batch:
        """Add the recorded routes to a batch; collective over data-parallel ranks.

        Missing rows come from the data-parallel rank of their recording (it holds the same layers), each once. If no
        rank misses any, only a count is exchanged.

        Raises:
            ReplayError: no rank recorded a sample in the last recording pass; on every rank.
        """
        missing = [sample_id for sample_id in dict.fromkeys(batch.sample_ids) if sample_id not in self._samples]
        # the sums over all ranks decide: no rank waits for one that raised
        lacking, samples = self._summed(len(missing), batch.num_samples)
        if lacking:
            self._fetch(missing, samples)
        return replace(batch, routes=tuple(self._samples[sample_id] for sample_id in batch.sample_ids))

    def _summed(self, *counts: int) -> list[int]:
        """Sum each count over data-parallel ranks."""
        total = torch.tensor(counts, device=self._data_parallel.device)
        self._data_parallel.reduce(total)
        return [int(count) for count in total.tolist()]

    def _fetch(self, missing: Sequence[str], num_samples: int) -> None:
        """Fetch the rows of `missing`, and send the rows missing elsewhere; collective over data-parallel ranks."""
        size, own = self._data_parallel.size, self._data_parallel.rank
        wanted_by = self._data_parallel.gather_objects(list(missing))
        wanted = dict.fromkeys(sample_id for ids in wanted_by for sample_id in ids)
        held = {sample_id: self._samples[sample_id].ids_MRK.shape for sample_id in wanted if sample_id in self._samples}
        held_by = self._data_parallel.gather_objects(held)
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
        received = self._exchange(to_send, entries)
        ends = np.cumsum([prod(shape) for _, shape in incoming])[:-1]
        for (sample_id, shape), ids in zip(incoming, np.split(received, ends), strict=False):
            self._samples[sample_id] = RoutedExperts(ids.reshape(shape).copy())

    def _whole(self, micro: MicroBatch, ids_LtK: torch.Tensor) -> RouteArray:
        """This rank's layers, all inputs of the micro-batch. [L, N, K]"""
        ids_LNK = np.zeros((len(ids_LtK), micro.tokens.num_inputs, ids_LtK.size(-1)), route_dtype(self._num_experts))
        if not len(ids_LtK):
            return ids_LNK
        # torch and its backends lack operations for unsigned 16-bit integers
        sent = ids_LtK.to(torch.uint8 if self._num_experts <= 1 << 8 else torch.int32).contiguous()
        for token_layout, piece in self._pieces(sent):
            slots_t = build_token_map(micro.batch.lengths_n, token_layout, pad_to=micro.pad_to).router_slots_t
            held = slots_t != PADDING
            ids_LNK[:, slots_t[held]] = piece.cpu().numpy()[:, held]
        return ids_LNK

    def _exchange(self, to_send: Sequence[Sequence[RouteArray]], entries: Sequence[int]) -> RouteArray:
        """Exchange arrays between data-parallel ranks.

        Args:
            to_send: arrays [x] for each rank.
            entries: number of entries expected from each rank.

        Returns:
            Received entries, in rank order. [sum(entries)]
        """
        dtype = route_dtype(self._num_experts)
        nothing = np.zeros(0, dtype)
        # as bytes: torch and its backends lack operations for unsigned 16-bit integers
        parts = [np.concatenate([nothing, *arrays]).view(np.uint8) for arrays in to_send]
        sizes = [count * dtype.itemsize for count in entries]
        device = self._data_parallel.device
        received = torch.empty(sum(sizes), dtype=torch.uint8, device=device)
        dist.all_to_all_single(
            received,
            torch.from_numpy(np.concatenate(parts)).to(device),
            sizes,
            [len(part) for part in parts],
            group=self._data_parallel.group,
        )
        return received.cpu().numpy().view(dtype)
