"""A micro-batch on one rank: its samples, and the token map of their layout."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from roll_r3.batch.batch import Batch
from roll_r3.batch.route_pieces import RoutePiece
from roll_r3.batch.token_map import PADDING, TokenMap

IntArray = npt.NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class KeptSlots:
    """Kept tokens of a micro-batch on one rank, as indices into its logits. J ids of all tokens together."""

    sizes_BS: torch.Tensor
    """Size of each token's set, int32; 0: none."""
    slots_J: torch.Tensor
    """Token of each id in the flattened [B, S], int64, ascending."""
    ids_J: torch.Tensor
    """Ids in the vocabulary, int64."""


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

    def kept(self, device: torch.device) -> KeptSlots | None:
        """Return the sets of this rank's tokens; None in a batch without kept tokens."""
        if self.batch.kept is None:
            return None
        slots_BS = self.tokens.slots_BS
        held = np.flatnonzero(slots_BS.reshape(-1) != PADDING)
        here = self.batch.kept.select(slots_BS.reshape(-1)[held]).spread(held, slots_BS.size)
        return KeptSlots(
            sizes_BS=torch.from_numpy(here.counts_S.reshape(slots_BS.shape)).to(device, non_blocking=True),
            slots_J=torch.from_numpy(here.row_of_id).to(device, non_blocking=True),
            ids_J=torch.from_numpy(here.ids_J.astype(np.int64)).to(device, non_blocking=True),
        )
