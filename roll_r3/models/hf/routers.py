"""transformers' routers: which there are, where they are, and how each computes its gates.

A router's forward returns (logits [t, E], gates [t, K], ids of the chosen experts [t, K]).
Shape legend: t tokens, E experts, K experts per token.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from roll_r3.errors import ConfigError

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
"""By the router's class, whose forward each was written after: of the router's own choice they are its own gates, to
the last bit."""


def router_class(module: torch.nn.Module) -> str:
    return type(module).__name__


def find_routers(model: Any, moe_layers: Sequence[int]) -> list[torch.nn.Module]:
    """The router of each MoE layer, in their order.

    Args:
        model: a ...ForCausalLM.
        moe_layers: global indices of the layers that route, as config.json says.

    Raises:
        ConfigError: a router of a class that is not known here, by its name, or other layers route.
    """
    routing = []
    for index, layer in enumerate(model.model.layers):
        routers = [module for module in layer.modules() if "router" in router_class(module).lower()]
        if not routers and index not in moe_layers:
            continue
        if [router_class(module) in GATES for module in routers] != [True]:
            named = routers or [module for module in layer.modules() if module is not layer]
            raise ConfigError(
                f"layer {index} of {router_class(model)} routes by {', '.join(dict.fromkeys(map(router_class, named)))}"
                f", where one router of a known class is wanted: {', '.join(GATES)}"
            )
        routing.append((index, routers[0]))
    if (built := [index for index, _ in routing]) != list(moe_layers):
        raise ConfigError(f"{router_class(model)} routes in layers {built}, its config.json says {list(moe_layers)}")
    return [router for _, router in routing]
