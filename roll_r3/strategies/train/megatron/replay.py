"""The routing session: what every router of a model chooses during one pipeline schedule.

All state lives in a context manager around the schedule. It puts a `RouterReplay` of its own into each router of the
live chunks, hands each micro-batch's rows to the routers of the chunk that runs, checks that every router consumed
every micro-batch exactly once, and leaves the routers as they were, also when the schedule raises. Outside a session
routers choose by themselves. Megatron's own global list of replay instances is never used.

Shape legend: t tokens that this rank's routers see, L routing layers of a chunk, K experts per token, N inputs of a
micro-batch, M rows of a sample's routes on the layer axis.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from time import perf_counter
from types import TracebackType
from typing import Any, Generic, Self, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from megatron.core.transformer.moe.router import TopKRouter
from megatron.core.transformer.moe.router_replay import RouterReplay
from megatron.core.transformer.transformer_config import TransformerConfig

from roll_r3.batch.batch import Batch
from roll_r3.batch.routes import RoutedExperts
from roll_r3.batch.token_map import PADDING, gather_slots
from roll_r3.errors import ReplayError
from roll_r3.models.facts import ModelFacts
from roll_r3.replay.padding import padding_rows
from roll_r3.strategies.base import ReplayCounts
from roll_r3.strategies.train.megatron.micro_batch import MicroBatch

TopK = Callable[..., tuple[torch.Tensor, torch.Tensor]]


@dataclass(frozen=True)
class Router:
    """One router of a live chunk."""

    module: TopKRouter
    layer: int
    """Global index of its decoder layer, from 0."""
    recomputed: bool
    """Whether training runs it a second time, in backward."""


def adopt_routers(chunk: Any) -> list[Router]:
    """The routers of a GPTModel's decoder, in layer order, each taken out of megatron's global list.

    Multi-token-prediction blocks lie outside the decoder and keep routing natively.
    """
    for module in chunk.modules():
        if isinstance(module, TopKRouter) and module.router_replay is not None:
            RouterReplay.global_router_replay_instances.remove(module.router_replay)
            module.router_replay = None
    return [
        Router(module, module.layer_number - 1, recomputes_router(chunk.config, index))
        for index, layer in enumerate(chunk.decoder.layers)
        for module in layer.modules()
        if isinstance(module, TopKRouter)
    ]


def recomputes_router(config: TransformerConfig, index_in_chunk: int) -> bool:
    """Whether megatron's recompute settings run the router of a chunk's layer again in backward."""
    if config.recompute_granularity == "full":
        return config.recompute_method == "uniform" or index_in_chunk < (config.recompute_num_layers or 0)
    return config.recompute_granularity == "selective" and "moe" in (config.recompute_modules or ())


class Stopwatch:
    """Host seconds spent on anything that touches routes."""

    def __init__(self) -> None:
        self.seconds = 0.0

    @contextmanager
    def running(self) -> Iterator[None]:
        start = perf_counter()
        try:
            yield
        finally:
            self.seconds += perf_counter() - start


@dataclass(frozen=True)
class RouterRows:
    """What one router is to choose for one micro-batch."""

    ids_tK: torch.Tensor
    """int64; padding slots hold balanced rows of their own."""
    known_t: torch.Tensor | None
    """bool; False where the live router decides. None: nowhere."""
    compared_t: torch.Tensor | None
    """bool; where the live router's choice is compared with the row. None: nowhere."""


class _RoutedLayer(RouterReplay, ABC):
    """Stands in for a router's RouterReplay during one session. Not registered with megatron."""

    def __init__(self, layer: int, stopwatch: Stopwatch) -> None:
        self.layer = layer
        self.in_forward = False
        """True while a micro-batch runs through this layer's chunk; a call outside is backward's recompute."""
        self.waiting = False
        """True until that forward reaches this layer."""
        self.consumed = 0
        self._stopwatch = stopwatch

    def get_replay_topk(
        self,
        scores: torch.Tensor,
        topk: int,
        num_groups: int | None = None,
        group_topk: int | None = None,
        default_compute_topk: TopK | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Megatron's hook: (scores of the chosen experts, their ids), both [t, K]."""
        assert default_compute_topk is not None

        def live() -> tuple[torch.Tensor, torch.Tensor]:
            return default_compute_topk(scores, topk, num_groups=num_groups, group_topk=group_topk)

        with self._stopwatch.running():
            return self.choose(scores, topk, live)

    @abstractmethod
    def choose(
        self, scores_tE: torch.Tensor, topk: int, live: Callable[[], tuple[torch.Tensor, torch.Tensor]]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Scores and ids of the chosen experts; `live` asks the router itself."""

    def expect(self) -> None:
        """A micro-batch's forward is about to run."""
        self.in_forward = self.waiting = True

    def _consume(self) -> None:
        """Raises ReplayError when the router runs outside a forward that was announced, or twice in one."""
        if not self.waiting:
            raise ReplayError(
                f"the router of layer {self.layer} ran outside a micro-batch of its session, or twice in one"
            )
        self.waiting = False
        self.consumed += 1

    def end_forward(self) -> None:
        """Raises ReplayError when the forward that just ended left this layer's rows unused."""
        if self.waiting:
            raise ReplayError(
                f"the router of layer {self.layer} did not consume its rows: the forward of micro-batch "
                f"{self.consumed} ended without running it"
            )
        self.in_forward = False


Layer = TypeVar("Layer", bound=_RoutedLayer)


class LayerReplay(_RoutedLayer):
    """Chooses the recorded experts; their weights come from the live scores, so the router learns.

    In forward it takes the rows of the micro-batch that runs, and queues what it chose where backward will recompute
    the layer. A call outside a forward is that recompute: it takes the oldest choice, since every chunk runs its
    backwards in the order of its forwards.
    """

    def __init__(self, layer: int, stopwatch: Stopwatch, *, recomputed: bool) -> None:
        super().__init__(layer, stopwatch)
        self.recomputed = recomputed
        self.rows: RouterRows | None = None
        self.queue: deque[torch.Tensor] = deque()
        self.agreed: torch.Tensor | None = None
        """Compared rows where the live router would have chosen the same set: int64 [], on the device."""

    def hand_over(self, rows: RouterRows) -> None:
        """The rows of the micro-batch whose forward is about to run."""
        self.expect()
        self.rows = rows

    def choose(
        self, scores_tE: torch.Tensor, topk: int, live: Callable[[], tuple[torch.Tensor, torch.Tensor]]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        ids_tK = self._recompute() if self.recomputed and not self.in_forward else self._forward(live)
        if ids_tK.shape != (scores_tE.shape[0], topk):
            raise ReplayError(
                f"layer {self.layer} routes {scores_tE.shape[0]} tokens to {topk} experts each, but the rows it was "
                f"given are {list(ids_tK.shape)}"
            )
        return scores_tE.gather(1, ids_tK), ids_tK

    def _forward(self, live: Callable[[], tuple[torch.Tensor, torch.Tensor]]) -> torch.Tensor:
        self._consume()
        rows, self.rows = self.rows, None
        assert rows is not None
        ids_tK = rows.ids_tK
        if rows.known_t is not None or rows.compared_t is not None:
            with torch.no_grad():
                _, live_tK = live()
            if live_tK.shape == ids_tK.shape:  # otherwise the caller says what is wrong
                if rows.compared_t is not None:
                    same_t = (live_tK.sort(-1).values == ids_tK.sort(-1).values).all(-1) & rows.compared_t
                    self.agreed = same_t.sum() + (0 if self.agreed is None else self.agreed)
                if rows.known_t is not None:
                    ids_tK = torch.where(rows.known_t[:, None], ids_tK, live_tK)
        if self.recomputed:
            self.queue.append(ids_tK)
        return ids_tK

    def _recompute(self) -> torch.Tensor:
        if not self.queue:
            raise ReplayError(
                f"backward recomputes the router of layer {self.layer} once more than it ran forward: no rows are left"
            )
        return self.queue.popleft()


class LayerRecord(_RoutedLayer):
    """Lets the router choose for real tokens, and keeps what it chose.

    Padding goes where it will go in replay: experts' batches are then the same in both, and so is every bit.
    """

    def __init__(self, layer: int, stopwatch: Stopwatch) -> None:
        super().__init__(layer, stopwatch)
        self.padding: RouterRows | None = None
        self.chosen: list[torch.Tensor] = []
        """Of each micro-batch, int64 [t, K]."""

    def hand_over(self, padding: RouterRows | None) -> None:
        """The rows of padding slots (`known_t` there), or None when there are none."""
        self.expect()
        self.padding = padding

    def choose(
        self, scores_tE: torch.Tensor, topk: int, live: Callable[[], tuple[torch.Tensor, torch.Tensor]]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        self._consume()
        scores_tK, ids_tK = live()
        if self.padding is not None:
            assert self.padding.known_t is not None
            ids_tK = torch.where(self.padding.known_t[:, None], self.padding.ids_tK, ids_tK)
            scores_tK = scores_tE.gather(1, ids_tK)
        self.padding = None
        self.chosen.append(ids_tK.detach())
        return scores_tK, ids_tK


class RoutingSession(ABC, Generic[Layer]):
    """One pipeline schedule's routing.

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
            num_micro_batches: that each chunk will run.
            ep_size: expert-parallel ranks, over which padding is spread.
        """
        self.routers = routers
        self.num_micro_batches = num_micro_batches
        self.facts = facts
        self.ep_size = ep_size
        self.device = device
        self.stopwatch = Stopwatch()
        self.layers: list[list[Layer]] = []
        """Of each chunk; empty outside the session."""

    @abstractmethod
    def make_layer(self, router: Router) -> Layer: ...

    @abstractmethod
    def stage(self, chunk: int, micro: MicroBatch) -> None:
        """Ready the layers of a chunk for one micro-batch."""

    @abstractmethod
    def close(self) -> None:
        """The schedule ended well: check and collect what the layers hold."""

    @contextmanager
    def micro_batch(self, chunk: int, micro: MicroBatch) -> Iterator[None]:
        """Around one forward of one chunk."""
        with self.stopwatch.running():
            self.stage(chunk, micro)
        yield
        for layer in self.layers[chunk]:
            layer.end_forward()

    def __enter__(self) -> Self:
        for router in self._all_routers():
            if router.module.router_replay is not None:
                raise ReplayError(f"the router of layer {router.layer} is in another session: sessions do not nest")
        self.layers = [[self.make_layer(router) for router in chunk] for chunk in self.routers]
        for chunk, layers in zip(self.routers, self.layers, strict=True):
            for router, layer in zip(chunk, layers, strict=True):
                router.module.router_replay = layer
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
                router.module.router_replay = None
            self.layers = []

    def _all_routers(self) -> Iterator[Router]:
        return (router for chunk in self.routers for router in chunk)

    def _padding_rows(self, count: int) -> npt.NDArray[np.int64]:
        """Balanced rows for so many padding slots. [count, K]"""
        return padding_rows(count, self.facts.num_experts, self.facts.top_k, ep_size=self.ep_size).numpy()

    def _to_device(self, array: npt.NDArray[Any]) -> torch.Tensor:
        if array.dtype == np.uint16:  # torch has few kernels for it
            array = array.astype(np.int32)
        return torch.from_numpy(array).to(self.device, non_blocking=True)


class ReplaySession(RoutingSession[LayerReplay]):
    """Replays `batch.routes` of every micro-batch. Its `counts` are there once it has closed."""

    def __init__(
        self,
        routers: Sequence[Sequence[Router]],
        num_micro_batches: int,
        *,
        facts: ModelFacts,
        ep_size: int,
        device: torch.device,
        layer_rows: Mapping[int, int],
        forward_only: bool,
    ) -> None:
        """
        Args:
            layer_rows: global layer -> its row on axis M of the routes.
            forward_only: no backward will come; the live router's own choice is compared with every row.
        """
        super().__init__(routers, num_micro_batches, facts=facts, ep_size=ep_size, device=device)
        self.layer_rows = layer_rows
        self.forward_only = forward_only
        self.counts = ReplayCounts()
        """This rank's."""
        self._tally: Counter[str] = Counter()

    def make_layer(self, router: Router) -> LayerReplay:
        return LayerReplay(router.layer, self.stopwatch, recomputed=router.recomputed and not self.forward_only)

    def stage(self, chunk: int, micro: MicroBatch) -> None:
        layers = self.layers[chunk]
        if not layers:
            return
        ids_NMK, known_N = _joined_routes(micro.batch, [self.layer_rows[layer.layer] for layer in layers], self.facts)
        slots_t = micro.tokens.router_slots_t
        real_t = slots_t != PADDING
        ids_tLK = gather_slots(ids_NMK, slots_t, 0)
        ids_tLK[~real_t] = self._padding_rows(int((~real_t).sum()))[:, None]
        known_t = real_t if known_N is None else real_t & gather_slots(known_N, slots_t, False)
        ids_LtK = self._to_device(ids_tLK).long().permute(1, 0, 2).contiguous()
        fall_back = bool((real_t & ~known_t).any())
        known = self._to_device(known_t | ~real_t) if fall_back else None
        compared = self._to_device(known_t) if self.forward_only and micro.counted else None
        for layer, ids_tK in zip(layers, ids_LtK, strict=True):
            layer.hand_over(RouterRows(ids_tK, known, compared))
        if micro.counted:
            trained_t = gather_slots(micro.batch.loss_mask_N, slots_t, False)
            tokens = {
                "trainable": trained_t,
                "trainable_replayed": trained_t & known_t,
                "missing": real_t & ~known_t,
                "padded": ~real_t,
                "compared": known_t & self.forward_only,
            }
            self._tally.update({name: int(which_t.sum()) * len(layers) for name, which_t in tokens.items()})

    def close(self) -> None:
        agreed = []
        for layer in (layer for layers in self.layers for layer in layers):
            if layer.queue:
                raise ReplayError(
                    f"backward did not recompute the router of layer {layer.layer} for {len(layer.queue)} of "
                    f"{self.num_micro_batches} micro-batches, though the recompute settings say that it does"
                )
            if layer.agreed is not None:
                agreed.append(layer.agreed)
        total = int(torch.stack(agreed).sum()) if agreed else 0
        self.counts = ReplayCounts(**self._tally, agreed=total)


def _joined_routes(
    batch: Batch, rows: Sequence[int], facts: ModelFacts
) -> tuple[npt.NDArray[Any], npt.NDArray[np.bool_] | None]:
    """The samples' routes end to end: ids [N, L, K] of the given rows of axis M, and which inputs they know, bool [N].

    Raises:
        ReplayError: no routes, routes that were not fetched, or routes of another shape than the samples'.
    """
    if batch.routes is None:
        raise ReplayError("the batch carries no routes")
    ids, known = [], []
    for sample_id, length, routes in zip(batch.sample_ids, batch.lengths_n, batch.routes, strict=True):
        if not isinstance(routes, RoutedExperts):
            raise ReplayError(f"sample {sample_id} carries a {type(routes).__name__}: fetch its routes first")
        if routes.num_rows != length or routes.top_k != facts.top_k or routes.num_layers <= max(rows):
            raise ReplayError(
                f"sample {sample_id} has {length} inputs, but its routes are {list(routes.ids_MRK.shape)} "
                f"[MoE layers, rows, experts per token] for a model of top-{facts.top_k}"
            )
        ids.append(routes.ids_MRK[list(rows)])
        known.append(routes.known_R)
    ids_NMK = np.concatenate(ids, axis=1).transpose(1, 0, 2)
    if all(k is None for k in known):
        return ids_NMK, None
    lengths = batch.lengths_n
    known_N = np.concatenate([np.ones(n, np.bool_) if k is None else k for n, k in zip(lengths, known, strict=True)])
    return ids_NMK, known_N


class RecordSession(RoutingSession[LayerRecord]):
    """Native routing, written down. Its `chosen` is there once it has closed."""

    chosen: list[torch.Tensor]
    """Of each micro-batch, int64 [L, t, K] over the layers of all chunks, in `local_layers` order."""

    def make_layer(self, router: Router) -> LayerRecord:
        return LayerRecord(router.layer, self.stopwatch)

    def stage(self, chunk: int, micro: MicroBatch) -> None:
        padding_t = micro.tokens.router_slots_t == PADDING
        padding = None
        if padding_t.any():
            ids_tK = np.zeros((len(padding_t), self.facts.top_k), np.int64)
            ids_tK[padding_t] = self._padding_rows(int(padding_t.sum()))
            padding = RouterRows(self._to_device(ids_tK), known_t=self._to_device(padding_t), compared_t=None)
        for layer in self.layers[chunk]:
            layer.hand_over(padding)

    def close(self) -> None:
        layers = [layer for chunk in self.layers for layer in chunk]
        if layers:
            self.chosen = [torch.stack(chosen) for chosen in zip(*(x.chosen for x in layers), strict=True)]
        else:  # a pipeline stage of dense layers only
            self.chosen = [torch.empty(0, 0, 0, dtype=torch.int64)] * self.num_micro_batches


def local_layers(routers: Sequence[Sequence[Router]]) -> list[int]:
    """Global layers of all routers of this rank, chunk after chunk."""
    return [router.layer for chunk in routers for router in chunk]
