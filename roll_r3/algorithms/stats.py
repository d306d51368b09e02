"""Token statistics, accumulated over micro-batches and ranks without a copy to the host per micro-batch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch

Reducer = Literal["mean", "max", "min"]
_START = {"max": -torch.inf, "min": torch.inf}


class TokenStats:
    """Running mean, maximum and minimum of named token values, and sums over optimizer steps.

    All stay on their device until `reduce`.
    """

    def __init__(self) -> None:
        self._sums: dict[str, torch.Tensor] = {}
        self._bounds: dict[str, tuple[Reducer, torch.Tensor]] = {}
        self._shares: dict[str, torch.Tensor] = {}
        self._merged = 0

    @torch.no_grad()
    def add(self, name: str, values: torch.Tensor, mask: torch.Tensor, reducer: Reducer = "mean") -> None:
        """Count `values` where `mask` is True (same shape)."""
        values = values.detach().double()
        if reducer == "mean":
            new = torch.stack([torch.where(mask, values, 0.0).sum(), mask.sum().double()])
            self._sums[name] = self._sums[name] + new if name in self._sums else new
            return
        pick = torch.amax if reducer == "max" else torch.amin
        new = pick(torch.where(mask, values, _START[reducer]))
        if name in self._bounds:
            new = pick(torch.stack([self._bounds[name][1], new]))
        self._bounds[name] = (reducer, new)

    @torch.no_grad()
    def add_share(self, name: str, share: torch.Tensor) -> None:
        """Count a micro-batch's share (a scalar) of a sum over one optimizer step, such as its loss."""
        share = share.detach().double()
        self._shares[name] = self._shares[name] + share if name in self._shares else share

    def merge(self, other: TokenStats) -> None:
        """Add the statistics of one optimizer step; do not use `other` afterwards."""
        self._merged += 1
        for name, share in other._shares.items():
            self.add_share(name, share)
        for name, sums in other._sums.items():
            self._sums[name] = self._sums[name] + sums if name in self._sums else sums
        for name, (reducer, bound) in other._bounds.items():
            if name in self._bounds:
                pick = torch.amax if reducer == "max" else torch.amin
                bound = pick(torch.stack([self._bounds[name][1], bound]))
            self._bounds[name] = (reducer, bound)

    def reduce(self, all_reduce: Callable[[torch.Tensor, str], None] | None = None) -> dict[str, float]:
        """Compute the figures on this rank, or over all ranks of a group.

        Args:
            all_reduce: function reducing a float64 vector in place over the group, by "sum" or "max". All ranks must
                have added the same names.

        Returns:
            Name -> figure, without names of no tokens. A sum per optimizer step is averaged over the merged steps.
        """
        out: dict[str, float] = {}
        if self._shares:
            names = sorted(self._shares)
            shares = torch.stack([self._shares[n] for n in names])
            if all_reduce:
                all_reduce(shares, "sum")
            out |= {n: total / max(self._merged, 1) for n, total in zip(names, shares.tolist(), strict=True)}
        if self._sums:
            names = sorted(self._sums)
            sums = torch.stack([self._sums[n] for n in names])
            if all_reduce:
                all_reduce(sums, "sum")
            out |= {n: total / count for n, (total, count) in zip(names, sums.tolist(), strict=True) if count}
        if self._bounds:
            names = sorted(self._bounds)
            signs = torch.tensor([1.0 if self._bounds[n][0] == "max" else -1.0 for n in names], dtype=torch.float64)
            bounds = torch.stack([self._bounds[n][1] for n in names])
            bounds = bounds * signs.to(bounds.device)
            if all_reduce:
                all_reduce(bounds, "max")
            values = (bounds.cpu() * signs).tolist()
            out |= {n: v for n, v in zip(names, values, strict=True) if abs(v) != torch.inf}
        return out
