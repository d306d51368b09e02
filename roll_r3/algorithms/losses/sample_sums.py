"""Sums over whole samples, where ranks and packed rows hold parts of them.

A loss that needs a whole sample asks for its sum here. The sum has no gradient, so a layout needs one small all-reduce
per micro-batch and no change to the backward. Pipeline stages without logits take no part. Tensor-parallel ranks hold
the same values and find the same sums. Shape legend: B x S token slots of this rank, n samples, J held slots.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch

from roll_r3.batch.micro_batch import MicroBatch
from roll_r3.batch.token_map import PADDING

AddUp = Callable[[torch.Tensor], None]
"""Add a tensor up, in place, over the ranks that hold parts of the same samples; collective over them."""


@dataclass(frozen=True, eq=False)
class SampleSums:
    """Sums over the samples of one counted micro-batch."""

    micro: MicroBatch
    device: torch.device
    add_up: AddUp

    @torch.no_grad()
    def means(self, values_BS: torch.Tensor, mask_BS: torch.Tensor) -> torch.Tensor:
        """Return the mean over the masked tokens of each slot's sample; collective over the ranks of `add_up`.

        Returns:
            fp64 [B, S]; 0 in padding, and in samples without a masked token.
        """
        both_BS2 = torch.stack([torch.where(mask_BS, values_BS, 0.0).double(), mask_BS.double()], dim=-1)
        sums_n, counts_n = self.sums(both_BS2).unbind(-1)
        return self.spread(sums_n / counts_n.clamp(min=1.0))

    @torch.no_grad()
    def sums(self, values_BSK: torch.Tensor) -> torch.Tensor:
        """Return the sum of each sample over all of its slots; collective over the ranks of `add_up`.

        Terms are added in one order, so a repeated pass gives the same bits.

        Args:
            values_BSK: values without gradient, [B, S, K].

        Returns:
            fp64 [n, K].
        """
        slots_J, _, sizes_n = self._held
        values_JK = values_BSK.double().flatten(0, 1)[slots_J]
        sums_nK = torch.segment_reduce(
            values_JK, "sum", lengths=sizes_n, initial=0.0, unsafe=True
        )  # no wait for a check
        self.add_up(sums_nK)
        return sums_nK

    def spread(self, values_n: torch.Tensor) -> torch.Tensor:
        """Return the value of each slot's sample, 0 in padding: [n] -> [B, S]."""
        slots_J, samples_J, _ = self._held
        spread = values_n.new_zeros(self.micro.tokens.slots_BS.size)
        spread[slots_J] = values_n[samples_J]
        return spread.view(self.micro.tokens.slots_BS.shape)

    @cached_property
    def _held(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Slots with a token, sample after sample [J]; the sample of each [J]; their number in each sample [n]."""
        batch, inputs = self.micro.batch, self.micro.tokens.slots_BS.ravel()
        slots_J = np.flatnonzero(inputs != PADDING)
        samples_J = batch.per_sample(np.arange(batch.num_samples))[inputs[slots_J]]
        order = np.argsort(samples_J, kind="stable")
        sizes_n = np.bincount(samples_J, minlength=batch.num_samples)
        slots, samples, sizes = (torch.from_numpy(x) for x in (slots_J[order], samples_J[order], sizes_n))
        return slots.to(self.device), samples.to(self.device), sizes.to(self.device)
