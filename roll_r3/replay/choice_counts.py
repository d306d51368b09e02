"""Counts of the experts chosen in a schedule. They stay on the device until it ends.

Shape legend: t tokens seen by this rank's routers, K experts per token, M MoE layers of the model, E experts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

LayerLoads = Mapping[int, torch.Tensor]
"""Global layer -> its counts on this rank, int64 [2, E], the first axis as `expert_load.SIDES`."""


def new_counts(num_experts: int, device: torch.device) -> torch.Tensor:
    """Return counts of 0. [2, E]"""
    return torch.zeros(2, num_experts, dtype=torch.int64, device=device)


def count_choices(counts_E: torch.Tensor, ids_tK: torch.Tensor, counted_t: torch.Tensor) -> None:
    """Add the choices of some tokens to the counts, without a copy to the host.

    Args:
        ids_tK: int64; of other tokens it may hold anything.
        counted_t: bool.
    """
    once_tK = counted_t[:, None].expand_as(ids_tK)
    counts_E.scatter_add_(0, torch.where(once_tK, ids_tK, 0).flatten(), once_tK.flatten().long())


def at_model_layers(
    loads: Sequence[LayerLoads], layers: Sequence[int], num_experts: int, device: torch.device
) -> torch.Tensor:
    """Return the sum of this rank's counts, 0 for layers of other ranks. [2, M, E]

    Args:
        loads: of each schedule.
        layers: global indices of the MoE layers.
    """
    rows = {layer: row for row, layer in enumerate(layers)}
    total_2ME = torch.zeros(2, len(layers), num_experts, dtype=torch.int64, device=device)
    for load in loads:
        for layer, counts_2E in load.items():
            total_2ME[:, rows[layer]] += counts_2E
    return total_2ME
