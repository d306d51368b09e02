"""Passive observer of a schedule. It knows the current micro-batch of every chunk.

In forward the schedule announces it. In backward autograd does: a gradient arriving at a micro-batch's output announces
its backward, in any order of the schedule.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from types import TracebackType
from typing import Self

import torch

from roll_r3.batch.micro_batch import MicroBatch


@dataclass(frozen=True)
class Pass:
    """One micro-batch on its way through one chunk."""

    micro: MicroBatch
    backward: bool


class Observer(ABC):
    """A context manager around one schedule; its hooks exist inside it only."""

    def __init__(self, num_chunks: int) -> None:
        self._passes: list[Pass | None] = [None] * num_chunks

    @abstractmethod
    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Release the micro-batches with their routes."""
        self._passes = [None] * len(self._passes)

    @contextmanager
    def forward(self, chunk: int, micro: MicroBatch) -> Iterator[None]:
        """Wrap one forward of one chunk."""
        self._passes[chunk] = Pass(micro, backward=False)
        yield
        self._passes[chunk] = None

    def await_backward(self, chunk: int, micro: MicroBatch, output: torch.Tensor) -> None:
        """Watch a chunk's output for the micro-batch's backward."""
        if output.requires_grad:
            output.register_hook(partial(self._begin_backward, chunk, micro))

    def current(self, chunk: int) -> Pass:
        """Current pass of the chunk."""
        current = self._passes[chunk]
        assert current is not None, "a module of the chunk ran outside a micro-batch"
        return current

    def _begin_backward(self, chunk: int, micro: MicroBatch, gradient: torch.Tensor) -> None:
        self._passes[chunk] = Pass(micro, backward=True)
