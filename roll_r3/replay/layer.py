"""One router during a routing session: it replays rows, or records its own choice.

Only expert ids are decided here. The trainer computes gate weights from the router's live scores.
Shape legend: t tokens seen by this rank's routers, K experts per token.
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
from roll_r3.replay.choice_counts import count_choices

LiveChoice = Callable[[], torch.Tensor]
"""Returns the router's own choice, int64 [t, K]."""


class Router(Protocol):
    """One router of a live model."""

    @property
    def layer(self) -> int:
        """Global index of its decoder layer, from 0."""

    @property
    def recomputed(self) -> bool:
        """True if backward runs the router a second time."""

    @property
    def attached(self) -> bool:
        """True while a session controls it."""

    def attach(self, layer: RoutedLayer) -> None:
        """Let `layer` decide from now on."""

    def detach(self) -> None:
        """Let the router choose by itself again. Safe to call twice."""


class Stopwatch:
    """Host seconds spent on routes."""

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
    """Rows to replay by one router for one micro-batch."""

    ids_tK: torch.Tensor
    """One of the dtypes in `WAITING`, or int64; padding slots hold balanced rows."""
    known_t: torch.Tensor | None
    """bool; False where the live router decides. None: all rows are known."""
    compared_t: torch.Tensor | None
    """bool; True where the live router's choice is compared with the row. None: nowhere."""


class RoutedLayer(ABC):
    """A session's part in one router; the hook of the backend asks it for the choice."""

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
            ReplayError: no rows are waiting, or the number of tokens differs from the rows.
        """
        with self._stopwatch.running():
            return self.choose(num_tokens, topk, live)

    @abstractmethod
    def choose(self, num_tokens: int, topk: int, live: LiveChoice) -> torch.Tensor: ...

    def expect(self) -> None:
        """Announce the forward of a micro-batch."""
        self.in_forward = self.waiting = True

    def _consume(self) -> None:
        """Raise ReplayError if the router runs outside an announced forward, or twice in one."""
        if not self.waiting:
            raise ReplayError(
                f"the router of layer {self.layer} ran outside a micro-batch of its session, or twice in one"
            )
        self.waiting = False
        self.consumed += 1

    def end_forward(self) -> None:
        """Raise ReplayError if the finished forward left this layer's rows unused."""
        if self.waiting:
            raise ReplayError(
                f"the router of layer {self.layer} did not consume its rows: the forward of micro-batch "
                f"{self.consumed} ended without running it"
            )
        self.in_forward = False


WAITING: dict[np.dtype[Any], torch.dtype] = {np.dtype(np.uint8): torch.uint8, np.dtype(np.uint16): torch.int16}
"""Dtype of recorded ids -> dtype of their tensors. Torch has few kernels for uint16; its bits wait as int16."""


def _int64(ids_tK: torch.Tensor) -> torch.Tensor:
    return ids_tK.long() & 0xFFFF if ids_tK.dtype == torch.int16 else ids_tK.long()


class LayerReplay(RoutedLayer):
    """Chooses the recorded experts. Their weights come from the live scores, so the router learns.

    In forward it takes the rows of the running micro-batch, and queues its choice if backward recomputes the layer. A
    call outside a forward is this recomputation: it takes the oldest choice, since every chunk runs its backwards in
    the order of its forwards.

    Rows wait in their recorded dtype (see `WAITING`), in the queue too; int64 exists for one layer at a time.
    """

    def __init__(
        self, layer: int, stopwatch: Stopwatch, *, recomputed: bool, load_2E: torch.Tensor | None = None
    ) -> None:
        """
        Args:
            recomputed: backward runs the router again.
            load_2E: receives the choices at compared tokens, on the device; see `choice_counts.LayerLoads`.
        """
        super().__init__(layer, stopwatch)
        self.recomputed = recomputed
        self.load_2E = load_2E
        self.rows: RouterRows | None = None
        self.queue: deque[torch.Tensor] = deque()
        self.agreed: torch.Tensor | None = None
        """Number of compared rows with the same set of experts as the live router's: int64 [], on the device."""

    def hand_over(self, rows: RouterRows) -> None:
        """Take the rows of the next forward."""
        self.expect()
        self.rows = rows

    def choose(self, num_tokens: int, topk: int, live: LiveChoice) -> torch.Tensor:
        ids_tK = self._recompute() if self.recomputed and not self.in_forward else self._forward(live)
        if ids_tK.shape != (num_tokens, topk):
            raise ReplayError(
                f"layer {self.layer} routes {num_tokens} tokens to {topk} experts each, but its rows are "
                f"{list(ids_tK.shape)}"
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
                    self._compare(_int64(ids_tK), live_tK, rows.compared_t)
                if rows.known_t is not None:
                    ids_tK = torch.where(rows.known_t[:, None], ids_tK, live_tK.to(ids_tK.dtype))
        if self.recomputed:
            self.queue.append(ids_tK)
        return ids_tK

    def _compare(self, ids_tK: torch.Tensor, live_tK: torch.Tensor, compared_t: torch.Tensor) -> None:
        """Count agreement and the load of the experts on both sides."""
        same_t = (live_tK.sort(-1).values == ids_tK.sort(-1).values).all(-1) & compared_t
        self.agreed = same_t.sum() + (0 if self.agreed is None else self.agreed)
        if self.load_2E is not None:
            for counts_E, chosen_tK in zip(self.load_2E, (ids_tK, live_tK), strict=True):
                count_choices(counts_E, chosen_tK, compared_t)

    def _recompute(self) -> torch.Tensor:
        if not self.queue:
            raise ReplayError(
                f"backward recomputes the router of layer {self.layer} once more than it ran forward: no rows are left"
            )
        return self.queue.popleft()


class LayerRecord(RoutedLayer):
    """Lets the router choose for real tokens, and keeps its choice.

    Padding takes the same rows as in replay: the experts' batches are then equal in both passes, to the bit.
    """

    def __init__(self, layer: int, stopwatch: Stopwatch) -> None:
        super().__init__(layer, stopwatch)
        self.padding: RouterRows | None = None
        self.chosen: list[torch.Tensor] = []
        """Choices per micro-batch, int64 [t, K]."""

    def hand_over(self, padding: RouterRows | None) -> None:
        """Take the rows of padding slots (`known_t` is True there); None without padding."""
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
