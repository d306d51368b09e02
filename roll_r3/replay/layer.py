"""What one router does during a routing session: replay rows, or record its own choice.

Only ids are decided here. Gate weights are the engine's, gathered from the router's live scores.
Shape legend: t tokens that this rank's routers see, K experts per token.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from time import perf_counter
from typing import Any, Protocol

import numpy as np
import torch

from roll_r3.errors import ReplayError

LiveChoice = Callable[[], torch.Tensor]
"""Ids that the router itself would choose, int64 [t, K]."""


class Router(Protocol):
    """One router of a live model."""

    @property
    def layer(self) -> int:
        """Global index of its decoder layer, from 0."""

    @property
    def recomputed(self) -> bool:
        """Whether training runs it a second time, in backward."""

    @property
    def attached(self) -> bool:
        """Whether a session holds it."""

    def attach(self, layer: RoutedLayer) -> None:
        """From now on `layer` decides."""

    def detach(self) -> None:
        """The router chooses by itself again; safe to call twice."""


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
    """Of a type of `WAITING`, or int64; padding slots hold balanced rows of their own."""
    known_t: torch.Tensor | None
    """bool; False where the live router decides. None: nowhere."""
    compared_t: torch.Tensor | None
    """bool; where the live router's choice is compared with the row. None: nowhere."""


class RoutedLayer(ABC):
    """What a session puts into one router; the engine's own hook asks it for the choice."""

    def __init__(self, layer: int, stopwatch: Stopwatch) -> None:
        self.layer = layer
        self.in_forward = False
        """True while a micro-batch runs through this layer's chunk; a call outside is backward's recompute."""
        self.waiting = False
        """True until that forward reaches this layer."""
        self.consumed = 0
        self._stopwatch = stopwatch

    def route(self, num_tokens: int, topk: int, live: LiveChoice) -> torch.Tensor:
        """Ids of the experts to use, int64 [num_tokens, topk]; `live` asks the router itself.

        Raises:
            ReplayError: the router runs when nothing waits for it, or with another number of tokens than announced.
        """
        with self._stopwatch.running():
            return self.choose(num_tokens, topk, live)

    @abstractmethod
    def choose(self, num_tokens: int, topk: int, live: LiveChoice) -> torch.Tensor: ...

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


WAITING: dict[np.dtype[Any], torch.dtype] = {np.dtype(np.uint8): torch.uint8, np.dtype(np.uint16): torch.int16}
"""Type of recorded ids -> of the tensors that hold them. Torch has few kernels for uint16: its bits wait as int16."""


def _int64(ids_tK: torch.Tensor) -> torch.Tensor:
    return ids_tK.long() & 0xFFFF if ids_tK.dtype == torch.int16 else ids_tK.long()


class LayerReplay(RoutedLayer):
    """Chooses the recorded experts; their weights come from the live scores, so the router learns.

    In forward it takes the rows of the micro-batch that runs, and queues what it chose where backward will recompute
    the layer. A call outside a forward is that recompute: it takes the oldest choice, since every chunk runs its
    backwards in the order of its forwards.

    Rows wait in the size in which they were recorded (see `WAITING`), in the queue too; int64 exists for one layer at
    a time.
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

    def choose(self, num_tokens: int, topk: int, live: LiveChoice) -> torch.Tensor:
        ids_tK = self._recompute() if self.recomputed and not self.in_forward else self._forward(live)
        if ids_tK.shape != (num_tokens, topk):
            raise ReplayError(
                f"layer {self.layer} routes {num_tokens} tokens to {topk} experts each, but the rows it was "
                f"given are {list(ids_tK.shape)}"
            )
        return _int64(ids_tK)

    def _forward(self, live: LiveChoice) -> torch.Tensor:
        self._consume()
        rows, self.rows = self.rows, None
        assert rows is not None
        ids_tK = rows.ids_tK
        if rows.known_t is not None or rows.compared_t is not None:
            with torch.no_grad():
                live_tK = live()
            if live_tK.shape == ids_tK.shape:  # otherwise the caller says what is wrong
                if rows.compared_t is not None:
                    same_t = (live_tK.sort(-1).values == _int64(ids_tK).sort(-1).values).all(-1) & rows.compared_t
                    self.agreed = same_t.sum() + (0 if self.agreed is None else self.agreed)
                if rows.known_t is not None:
                    ids_tK = torch.where(rows.known_t[:, None], ids_tK, live_tK.to(ids_tK.dtype))
        if self.recomputed:
            self.queue.append(ids_tK)
        return ids_tK

    def _recompute(self) -> torch.Tensor:
        if not self.queue:
            raise ReplayError(
                f"backward recomputes the router of layer {self.layer} once more than it ran forward: no rows are left"
            )
        return self.queue.popleft()


class LayerRecord(RoutedLayer):
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

    def choose(self, num_tokens: int, topk: int, live: LiveChoice) -> torch.Tensor:
        self._consume()
        ids_tK = live()
        if self.padding is not None:
            assert self.padding.known_t is not None
            ids_tK = torch.where(self.padding.known_t[:, None], self.padding.ids_tK, ids_tK)
        self.padding = None
        self.chosen.append(ids_tK)
        return ids_tK
