"""The routing session: controls the choices of all routers during one schedule of forwards and backwards.

All state lives in a context manager around the schedule. It attaches its own `RoutedLayer` to each router of the live
chunks and hands each micro-batch's rows to the routers of the running chunk. At the end it checks that every router
consumed every micro-batch exactly once. It restores the routers on exit, also when the schedule raises. Outside a
session, routers choose by themselves.

Shape legend: t tokens seen by this rank's routers, L routing layers of a chunk, K experts per token, N inputs of a
micro-batch, P padding slots, s rows given to a router.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import TracebackType
from typing import Any, Generic, Self, TypeVar

import numpy as np
import numpy.typing as npt
import torch

from roll_r3.batch.micro_batch import MicroBatch
from roll_r3.batch.route_pieces import ReadRoutes, RoutePiece
from roll_r3.batch.routes import route_dtype
from roll_r3.batch.token_map import PADDING
from roll_r3.errors import ReplayError
from roll_r3.models.facts import ModelFacts
from roll_r3.replay.carrier import Carrier
from roll_r3.replay.choice_counts import LayerLoads, count_choices, new_counts
from roll_r3.replay.counts import ReplayCounts
from roll_r3.replay.layer import (
    WAITING,
    LayerRecord,
    LayerReplay,
    RoutedLayer,
    Router,
    RouterRows,
    Stopwatch,
)
from roll_r3.replay.padding import padding_rows
from roll_r3.replay.rows import chunk_rows, deliver

Layer = TypeVar("Layer", bound=RoutedLayer)


class RoutingSession(ABC, Generic[Layer]):
    """The routing of one schedule.

    Example:
        with session:
            for chunk, micro_batch in order_of_the_schedule:
                with session.micro_batch(chunk, micro_batch):
                    output = chunks[chunk](**inputs)
    """

    def __init__(
        self,
        routers: Sequence[Sequence[Router]],
        num_micro_batches: int,
        *,
        facts: ModelFacts,
        ep_size: int,
        device: torch.device,
    ) -> None:
        """
        Args:
            routers: of each live chunk.
            num_micro_batches: forwards of each chunk in the schedule.
            ep_size: expert-parallel ranks; padding is spread evenly over them.
        """
        self.routers = routers
        self.num_micro_batches = num_micro_batches
        self.facts = facts
        self.ep_size = ep_size
        self.carrier = Carrier(device)
        self.stopwatch = Stopwatch()
        self.layers: list[list[Layer]] = []
        """Layers per chunk; empty outside the session."""
        self.loads: LayerLoads = {}
        """Counts of this rank's layers; set when the session closes, empty if it compares nothing."""

    @abstractmethod
    def make_layer(self, router: Router) -> Layer: ...

    @abstractmethod
    def stage(self, chunk: int, micro: MicroBatch) -> None:
        """Prepare the layers of a chunk for one micro-batch."""

    @abstractmethod
    def close(self) -> None:
        """Check and collect the state of the layers after a schedule without errors."""

    @contextmanager
    def micro_batch(self, chunk: int, micro: MicroBatch) -> Iterator[None]:
        """Wrap one forward of one chunk."""
        with self.stopwatch.running():
            self.stage(chunk, micro)
        yield
        for layer in self.layers[chunk]:
            layer.end_forward()

    def __enter__(self) -> Self:
        for router in self._all_routers():
            if router.attached:
                raise ReplayError(f"the router of layer {router.layer} is in another session: sessions do not nest")
        self.layers = [[self.make_layer(router) for router in chunk] for chunk in self.routers]
        for chunk, layers in zip(self.routers, self.layers, strict=True):
            for router, layer in zip(chunk, layers, strict=True):
                router.attach(layer)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                for layer in (layer for layers in self.layers for layer in layers):
                    if layer.consumed != self.num_micro_batches:
                        raise ReplayError(
                            f"the router of layer {layer.layer} consumed {layer.consumed} micro-batches of "
                            f"{self.num_micro_batches}"
                        )
                with self.stopwatch.running():
                    self.close()
        finally:
            for router in self._all_routers():
                router.detach()
            self.layers = []

    def _all_routers(self) -> Iterator[Router]:
        return (router for chunk in self.routers for router in chunk)

    def _padding_rows(self, count: int) -> npt.NDArray[np.int64]:
        """Balanced rows for `count` padding slots. [count, K]"""
        return padding_rows(count, self.facts.num_experts, self.facts.top_k, ep_size=self.ep_size).numpy()

    def _carried(self, array: npt.NDArray[Any]) -> torch.Tensor:
        """Copy an array to the device."""
        host = self.carrier.empty(array.shape, torch.from_numpy(array[:0]).dtype)
        host.copy_(torch.from_numpy(array))
        return self.carrier.carry(host)


class ReplaySession(RoutingSession[LayerReplay]):
    """Replays the rows carried by every micro-batch. Its `counts` and `loads` are set when it closes."""

    def __init__(
        self,
        routers: Sequence[Sequence[Router]],
        num_micro_batches: int,
        *,
        facts: ModelFacts,
        ep_size: int,
        device: torch.device,
        forward_only: bool,
        compares: bool,
    ) -> None:
        """
        Args:
            forward_only: no backward follows.
            compares: compare the live router's own choice with every row, once per forward.
        """
        super().__init__(routers, num_micro_batches, facts=facts, ep_size=ep_size, device=device)
        self.forward_only = forward_only
        self.compares = compares
        self.counts = ReplayCounts()
        """Counts of this rank alone."""
        self._tally: Counter[str] = Counter()

    def make_layer(self, router: Router) -> LayerReplay:
        load_2E = new_counts(self.facts.num_experts, self.carrier.device) if self.compares else None
        recomputed = router.recomputed and not self.forward_only
        return LayerReplay(router.layer, self.stopwatch, recomputed=recomputed, load_2E=load_2E)

    def stage(self, chunk: int, micro: MicroBatch) -> None:
        layers = self.layers[chunk]
        if not layers:
            return
        slots_t = micro.tokens.router_slots_t
        real_t = slots_t != PADDING
        pieces = _delivered(micro, chunk, len(layers), int(np.count_nonzero(real_t)))
        ids_LtK, known_t = self._laid_out(pieces, len(layers), slots_t)
        fall_back = bool((real_t & ~known_t).any())
        known = self._carried(known_t | ~real_t) if fall_back else None
        compared = self._carried(known_t) if self.compares and micro.counted else None
        for layer, ids_tK in zip(layers, self.carrier.carry(ids_LtK), strict=True):
            layer.hand_over(RouterRows(ids_tK, known, compared))
        if micro.counted:
            trained_t = real_t & micro.batch.loss_mask_N[slots_t]
            tokens = {
                "trainable": trained_t,
                "trainable_replayed": trained_t & known_t,
                "missing": real_t & ~known_t,
                "padded": ~real_t,
                "compared": known_t & self.compares,
            }
            self._tally.update({name: np.count_nonzero(which_t) * len(layers) for name, which_t in tokens.items()})

    def close(self) -> None:
        agreed, loads = [], {}
        for layer in (layer for layers in self.layers for layer in layers):
            if layer.queue:
                raise ReplayError(
                    f"backward did not recompute the router of layer {layer.layer} for {len(layer.queue)} of "
                    f"{self.num_micro_batches} micro-batches, although the recompute settings require it"
                )
            if layer.agreed is not None:
                agreed.append(layer.agreed)
            if layer.load_2E is not None:
                loads[layer.layer] = layer.load_2E
        self.loads = loads
        total = int(torch.stack(agreed).sum()) if agreed else 0
        self.counts = ReplayCounts(**self._tally, agreed=total)

    def _laid_out(
        self, pieces: Sequence[RoutePiece], num_layers: int, slots_t: npt.NDArray[np.int64]
    ) -> tuple[torch.Tensor, npt.NDArray[np.bool_]]:
        """Lay out the rows of a chunk's layers in host memory [L, t, K], with a mask of slots with a known row [t]."""
        dtype = route_dtype(self.facts.num_experts)
        host = self.carrier.empty((num_layers, len(slots_t), self.facts.top_k), WAITING[dtype])
        ids_LtK = host.numpy().view(dtype)
        known_t = slots_t != PADDING
        (real,) = np.nonzero(known_t)
        padding_PK = self._padding_rows(len(slots_t) - len(real)).astype(dtype)
        if (firsts := _in_order(pieces, real, slots_t[real])) is not None:
            for piece, first in zip(pieces, firsts, strict=True):
                rows = slice(first, first + piece.num_rows)
                ids_LtK[:, rows] = piece.ids_LRK
                if piece.known_R is not None:
                    known_t[rows] = piece.known_R
            if len(padding_PK):
                ids_LtK[:, slots_t == PADDING] = padding_PK
            return host, known_t
        places_t = np.empty(len(slots_t), np.int64)
        places_t[real[slots_t[real].argsort()]] = np.arange(len(real))
        places_t[slots_t == PADDING] = np.arange(len(real), len(slots_t))
        for layer, ids_tK in enumerate(ids_LtK):  # one layer's rows at a time, to stay in the processor's cache
            joined_sK = np.concatenate([*(piece.ids_LRK[layer] for piece in pieces), padding_PK])
            np.take(joined_sK, places_t, axis=0, out=ids_tK, mode="clip")  # "raise" would go through a copy
        if any(piece.known_R is not None for piece in pieces):
            known_t[real] = np.concatenate([piece.known for piece in pieces])[places_t[real]]
        return host, known_t


def _in_order(
    pieces: Sequence[RoutePiece], real: npt.NDArray[np.int64], slots: npt.NDArray[np.int64]
) -> list[int] | None:
    """First token of each piece, if tokens and rows have the same order (packed, or one row of samples); else None.

    Args:
        real: tokens without padding, ascending.
        slots: the input held by each of them.
    """
    if not len(slots) or (np.diff(slots) < 0).any():
        return None
    ends = np.cumsum([piece.num_rows for piece in pieces])
    firsts, lasts = real[ends - [piece.num_rows for piece in pieces]], real[ends - 1]
    if (lasts - firsts + 1 != [piece.num_rows for piece in pieces]).any():
        return None
    return [int(first) for first in firsts]


def replaying(
    micro_batches: Sequence[MicroBatch],
    routers: Sequence[Sequence[Router]],
    *,
    facts: ModelFacts,
    ep_size: int,
    device: torch.device,
    layer_rows: Mapping[int, int],
    read: ReadRoutes,
    forward_only: bool,
    compares: bool,
) -> tuple[ReplaySession, list[MicroBatch]]:
    """Make a session for one schedule, and its micro-batches with the rows to replay.

    Args:
        layer_rows: global layer -> its row on axis M of the routes.
        read: reads the routes; its time counts on the session's stopwatch.
        forward_only, compares: see `ReplaySession`.

    Raises:
        ReplayError: no routes, or routes of another shape than the samples and the model need.
        RouteError: damaged routes.
        LostWorkerError: the process holding the routes is gone.
    """
    session = ReplaySession(
        routers,
        len(micro_batches),
        facts=facts,
        ep_size=ep_size,
        device=device,
        forward_only=forward_only,
        compares=compares,
    )
    with session.stopwatch.running():
        rows = chunk_rows(routers, layer_rows)
        return session, deliver(micro_batches, rows, num_layers=len(layer_rows), facts=facts, read=read)


def _delivered(micro: MicroBatch, chunk: int, num_layers: int, num_rows: int) -> Sequence[RoutePiece]:
    """Return the rows delivered to a chunk.

    Raises:
        ReplayError: no rows, or not the rows seen by its routers.
    """
    if micro.routes is None:
        raise ReplayError("the micro-batch carries no routes: deliver them first")
    pieces = micro.routes[chunk]
    layers, rows = {piece.ids_LRK.shape[0] for piece in pieces}, sum(piece.num_rows for piece in pieces)
    if layers - {num_layers} or rows != num_rows:
        raise ReplayError(
            f"a micro-batch has {rows} rows in {sorted(layers)} layers, but the {num_layers} routers of this chunk "
            f"need {num_rows}"
        )
    return pieces


class RecordSession(RoutingSession[LayerRecord]):
    """Records native routing. Its `chosen` and `loads` are set when it closes."""

    chosen: list[torch.Tensor]
    """Choices per micro-batch, int64 [L, t, K] over the layers of all chunks, chunk after chunk."""

    def __enter__(self) -> Self:
        self._num_tokens: list[int] = []
        """Tokens seen by the routers, per micro-batch."""
        self._counted: list[torch.Tensor] = []
        """Tokens without padding, and none of a repeat, per micro-batch: bool [t]."""
        return super().__enter__()

    def make_layer(self, router: Router) -> LayerRecord:
        return LayerRecord(router.layer, self.stopwatch)

    def stage(self, chunk: int, micro: MicroBatch) -> None:
        padding_t = micro.tokens.router_slots_t == PADDING
        if chunk == 0:
            self._num_tokens.append(len(padding_t))
            self._counted.append(self._carried(~padding_t & micro.counted))
        padding = None
        if padding_t.any():
            ids_tK = np.zeros((len(padding_t), self.facts.top_k), np.int64)
            ids_tK[padding_t] = self._padding_rows(int(padding_t.sum()))
            padding = RouterRows(self._carried(ids_tK), known_t=self._carried(padding_t), compared_t=None)
        for layer in self.layers[chunk]:
            layer.hand_over(padding)

    def close(self) -> None:
        layers = [layer for chunk in self.layers for layer in chunk]
        if layers:
            self.chosen = [torch.stack(chosen) for chosen in zip(*(x.chosen for x in layers), strict=True)]
            self.loads = {layer.layer: self._load_of(layer) for layer in layers}
        else:  # a pipeline stage of dense layers only
            self.chosen = [torch.empty(0, t, self.facts.top_k, dtype=torch.int64) for t in self._num_tokens]

    def _load_of(self, layer: LayerRecord) -> torch.Tensor:
        """Count a layer's choices on the side of the live router. [2, E]"""
        load_2E = new_counts(self.facts.num_experts, self.carrier.device)
        for ids_tK, counted_t in zip(layer.chosen, self._counted, strict=True):
            count_choices(load_2E[1], ids_tK, counted_t)
        return load_2E
