"""A micro-batch as one rank sees it: its samples, and the token map that lays them out."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from roll_r3.batch.batch import Batch
from roll_r3.batch.route_pieces import RoutePiece
from roll_r3.batch.token_map import TokenMap

IntArray = npt.NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class MicroBatch:
    """Samples that go through the model together."""

    batch: Batch
    samples: IntArray
    """Which of the batch that was cut."""
    tokens: TokenMap
    """Of this rank."""
    pad_to: int = 0
    """What the map was padded to (see `build_token_map`); the maps of other ranks need it."""
    counted: bool = True
    """False for a repeat that only fills the schedule: its results are thrown away, and nothing is learnt from it."""
    routes: tuple[tuple[RoutePiece, ...], ...] | None = None
    """Replay: of each chunk, the rows that its routers see, in the order of the inputs (see `delivery.deliver`)."""

    def tensor(self, values_N: npt.NDArray[np.generic], fill: float | int | bool, device: torch.device) -> torch.Tensor:
        """This rank's view of a jagged array. [B, S]"""
        return torch.from_numpy(self.tokens.gather(values_N, fill)).to(device, non_blocking=True)
