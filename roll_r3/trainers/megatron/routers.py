"""Megatron's routers, and the hook of a routing session."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.transformer.moe.router import TopKRouter
from megatron.core.transformer.moe.router_replay import RouterReplay
from megatron.core.transformer.transformer_config import TransformerConfig

from roll_r3.replay.layer import RoutedLayer

TopK = Callable[..., tuple[torch.Tensor, torch.Tensor]]


@dataclass(frozen=True)
class Router:
    """One router of a live chunk."""

    module: TopKRouter
    layer: int
    """Global index of its decoder layer, from 0."""
    recomputed: bool
    """True if backward runs the router a second time."""

    @property
    def attached(self) -> bool:
        return self.module.router_replay is not None

    def attach(self, layer: RoutedLayer) -> None:
        self.module.router_replay = _Hook(layer)

    def detach(self) -> None:
        self.module.router_replay = None


class _Hook(RouterReplay):
    """Replaces a router's RouterReplay during one session. Not registered with megatron."""

    def __init__(self, layer: RoutedLayer) -> None:
        self._layer = layer

    def get_replay_topk(
        self,
        scores: torch.Tensor,
        topk: int,
        num_groups: int | None = None,
        group_topk: int | None = None,
        default_compute_topk: TopK | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Megatron's call: (scores of the chosen experts, their ids), both [t, K]."""
        assert default_compute_topk is not None

        def live() -> torch.Tensor:
            return default_compute_topk(scores, topk, num_groups=num_groups, group_topk=group_topk)[1]

        ids_tK = self._layer.route(len(scores), topk, live)
        return scores.gather(1, ids_tK), ids_tK


def adopt_routers(chunk: Any) -> list[Router]:
    """Return the routers of a GPTModel's decoder in layer order, and remove them from megatron's global list.

    Multi-token-prediction blocks are outside the decoder and keep routing natively.
    """
    for module in chunk.modules():
        if isinstance(module, TopKRouter) and module.router_replay is not None:
            RouterReplay.global_router_replay_instances.remove(module.router_replay)
            module.router_replay = None
    return [
        Router(module, module.layer_number - 1, recomputes_router(chunk.config, index))
        for index, layer in enumerate(chunk.decoder.layers)
        for module in layer.modules()
        if isinstance(module, TopKRouter)
    ]


def recomputes_router(config: TransformerConfig, index_in_chunk: int) -> bool:
    """True if megatron's recompute settings run the router of a chunk's layer again in backward."""
    if config.recompute_granularity == "full":
        return config.recompute_method == "uniform" or index_in_chunk < (config.recompute_num_layers or 0)
    return config.recompute_granularity == "selective" and "moe" in (config.recompute_modules or ())
