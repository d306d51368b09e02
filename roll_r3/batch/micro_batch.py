"""A micro-batch on one rank: its samples, and the token map of their layout."""

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
    """Samples of one pass through the model."""

    batch: Batch
    samples: IntArray
    """Their indices in the cut batch."""
    tokens: TokenMap
    """Token map of this rank."""
    pad_to: int = 0
    """Padded size of the map (see `build_token_map`); needed to build the maps of other ranks."""
    counted: bool = True
    """False for a repeat to fill the schedule: its results are discarded, and its gradient is zero."""
    routes: tuple[tuple[RoutePiece, ...], ...] | None = None
    """Replay: rows for the routers of each chunk, in the order of the inputs (see `replay.rows.deliver`)."""

    def tensor(self, values_N: npt.NDArray[np.generic], fill: float | int | bool, device: torch.device) -> torch.Tensor:
        """This rank's view of a jagged array. [B, S]"""
        return torch.from_numpy(self.tokens.gather(values_N, fill)).to(device, non_blocking=True)
