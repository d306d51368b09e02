"""transformers' routers: which there are, and the hook by which a routing session decides for them.

A router returns (logits, gates, ids of the chosen experts). The hook replaces the ids and computes the gates again from
the live logits, as that class of router does: they are the same to the last bit where the ids are.
Shape legend: t tokens, E experts, K experts per token.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch.utils.hooks import RemovableHandle

from roll_r3.errors import ConfigError
from roll_r3.strategies.train.routed_layer import RoutedLayer

RouterOutput = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
Gates = Callable[[Any, torch.Tensor, torch.Tensor], torch.Tensor]
"""(router, logits [t, E], ids [t, K]) -> gates [t, K]."""


def _softmax_gates(router: Any, logits_tE: torch.Tensor, ids_tK: torch.Tensor) -> torch.Tensor:
    gates_tK = logits_tE.softmax(-1, dtype=torch.float).gather(1, ids_tK)
    if router.norm_topk_prob:
        gates_tK = gates_tK / gates_tK.sum(-1, keepdim=True)
    return gates_tK.to(logits_tE.dtype)


def _mixtral_gates(router: Any, logits_tE: torch.Tensor, ids_tK: torch.Tensor) -> torch.Tensor:
    gates_tK = logits_tE.float().softmax(-1).gather(1, ids_tK)
    return gates_tK / gates_tK.sum(-1, keepdim=True)


def _deepseek_gates(router: Any, logits_tE: torch.Tensor, ids_tK: torch.Tensor) -> torch.Tensor:
    """The bias and the groups take part in the choice alone."""
    gates_tK = logits_tE.sigmoid().gather(1, ids_tK)
    if router.norm_topk_prob:
        gates_tK = gates_tK / (gates_tK.sum(-1, keepdim=True) + 1e-20)
    return gates_tK * router.routed_scaling_factor


GATES: dict[str, Gates] = {
    "Qwen3MoeTopKRouter": _softmax_gates,
    "Qwen2MoeTopKRouter": _softmax_gates,
    "OlmoeTopKRouter": _softmax_gates,
    "MixtralTopKRouter": _mixtral_gates,
    "DeepseekV3TopkRouter": _deepseek_gates,
}
"""By the router's class, whose forward each was written after."""


class HookedRouter:
    """One router of a live model (a `Router`)."""

    def __init__(self, module: torch.nn.Module, layer: int, *, recomputed: bool) -> None:
        """
        Args:
            recomputed: backward runs it again.

        Raises:
            ConfigError: a class of router whose gates are not known here.
        """
        name = router_class(module)
        if name not in GATES:
            raise ConfigError(
                f"layer {layer} routes by transformers' {name}, whose gates fsdp2 does not know how to compute; it "
                f"knows {', '.join(GATES)}"
            )
        self.module = module
        self.layer = layer
        self.recomputed = recomputed
        self._gates = GATES[name]
        self._handle: RemovableHandle | None = None

    @property
    def attached(self) -> bool:
        return self._handle is not None

    def attach(self, layer: RoutedLayer) -> None:
        self._handle = self.module.register_forward_hook(partial(self._decide, layer))

    def detach(self) -> None:
        if self._handle is not None:
            self._handle.remove()
        self._handle = None

    def _decide(self, layer: RoutedLayer, module: torch.nn.Module, inputs: Any, output: RouterOutput) -> RouterOutput:
        logits_tE, _, live_tK = output
        ids_tK = layer.route(len(logits_tE), live_tK.size(-1), lambda: live_tK)
        return logits_tE, self._gates(module, logits_tE, ids_tK), ids_tK


def find_routers(layers: Sequence[torch.nn.Module], *, recomputed: bool) -> list[HookedRouter]:
    """The routers of decoder layers, in layer order. Raises ConfigError as `HookedRouter` does."""
    return [
        HookedRouter(module, index, recomputed=recomputed)
        for index, layer in enumerate(layers)
        for module in layer.modules()
        if "router" in router_class(module).lower()
    ]


def router_class(module: torch.nn.Module) -> str:
    return type(module).__name__
