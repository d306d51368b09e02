"""Rows for padding slots: k distinct experts each, spread evenly.

A padding token passes through the experts like any other. With experts 0..k-1 for all of them, they would all land on
one expert-parallel rank (miles#2697 ran out of memory). A row with the same expert twice breaks the dispatcher's counts
(verl#4986).
"""

from __future__ import annotations

from functools import cache
from math import lcm

import torch


def padding_rows(num_rows: int, num_experts: int, top_k: int, *, ep_size: int = 1) -> torch.Tensor:
    """Make rows of `top_k` distinct experts with an even load on expert-parallel ranks and experts.

    The walk visits one expert of each rank, then the next of each rank, and so on. The loads of any two expert-parallel
    ranks differ by at most one entry over all rows, and so do the loads of any two experts.

    Returns:
        int64 [num_rows, top_k] on the CPU.

    Raises:
        ValueError: top_k above num_experts, or num_experts not divisible by ep_size.
    """
    if top_k > num_experts or num_experts % ep_size:
        raise ValueError(f"cannot choose {top_k} of {num_experts} experts on {ep_size} expert-parallel ranks")
    period_PK = _period(num_experts, top_k, ep_size)
    return period_PK.repeat(-(-num_rows // len(period_PK)), 1)[:num_rows]


@cache
def _period(num_experts: int, top_k: int, ep_size: int) -> torch.Tensor:
    """One period of the walk. [P, K]"""
    walk = torch.arange(num_experts).view(ep_size, -1).T.reshape(-1)
    entries = torch.arange(lcm(num_experts, top_k)) % num_experts
    return walk[entries].view(-1, top_k)
