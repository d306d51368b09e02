"""The data-parallel ranks of a batch, and their collectives."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

_OPERATIONS = {"sum": dist.ReduceOp.SUM, "max": dist.ReduceOp.MAX}


@dataclass(frozen=True)
class DataParallel:
    """This rank among the ranks with the same layers and other samples."""

    rank: int
    size: int
    device: torch.device
    group: dist.ProcessGroup | None = None
    """None: the whole world."""

    def reduce(self, values: torch.Tensor, operation: str = "sum") -> None:
        """Reduce in place over all ranks, "sum" or "max"; collective."""
        if self.size > 1:
            dist.all_reduce(values, _OPERATIONS[operation], group=self.group)

    def gather_objects(self, value: Any) -> list[Any]:
        """The value of every rank, in rank order; collective."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value, group=self.group)
        return values
