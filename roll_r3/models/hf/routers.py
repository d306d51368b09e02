"""Routers of transformers: their classes, their layers, and the formulas of their gates.

A router's forward returns (logits [t, E], gates [t, K], ids of the chosen experts [t, K]).
Shape legend: t tokens, E experts, K experts per token.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from roll_r3.errors import ConfigError
from roll_r3.models.architectures import ARCHITECTURES
from roll_r3.models.architectures.base import GateKind

RouterOutput = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
Gates = Callable[[Any, torch.Tensor, torch.Tensor], torch.Tensor]
"""(router, logits [t, E], ids [t, K]) -> gates [t, K]."""
SMALLEST_SUM = 1e-20
"""Smallest sum of probabilities used as a divisor: far above the precision limit of fp32, far below K / E."""


def _renormalised(chosen_tK: torch.Tensor, logits_tE: torch.Tensor, ids_tK: torch.Tensor) -> torch.Tensor:
    """Return gates with a sum of 1 in every row: the chosen probabilities over their sum.

    Probabilities of very unlikely replayed experts vanish. There the softmax over the chosen logits, mathematically
    equal, replaces them, in backward too. A router's own choice has at least K / E.
    """
    sum_t1 = chosen_tK.sum(-1, keepdim=True)
    vanishing_t1 = sum_t1 < SMALLEST_SUM
    over_chosen_tK = logits_tE.gather(1, ids_tK).softmax(-1, dtype=torch.float)
    # the division must not be by 0 even where it is not selected: its gradient would be NaN
    return torch.where(vanishing_t1, over_chosen_tK, chosen_tK / sum_t1.masked_fill(vanishing_t1, 1.0))


def _softmax_gates(router: Any, logits_tE: torch.Tensor, ids_tK: torch.Tensor) -> torch.Tensor:
    gates_tK = logits_tE.softmax(-1, dtype=torch.float).gather(1, ids_tK)
    if router.norm_topk_prob:
        gates_tK = _renormalised(gates_tK, logits_tE, ids_tK)
    return gates_tK.to(logits_tE.dtype)


def _always_renormalised_gates(router: Any, logits_tE: torch.Tensor, ids_tK: torch.Tensor) -> torch.Tensor:
    return _renormalised(logits_tE.float().softmax(-1).gather(1, ids_tK), logits_tE, ids_tK)


def _sigmoid_gates(router: Any, logits_tE: torch.Tensor, ids_tK: torch.Tensor) -> torch.Tensor:
    """Return sigmoid gates. The bias and the groups affect only the choice of experts."""
    gates_tK = logits_tE.sigmoid().gather(1, ids_tK)
    if router.norm_topk_prob:
        gates_tK = gates_tK / (gates_tK.sum(-1, keepdim=True) + 1e-20)
    scaled_tK: torch.Tensor = gates_tK * router.routed_scaling_factor
    return scaled_tK


_KINDS: dict[GateKind, Gates] = {
    "softmax": _softmax_gates,
    "softmax renormalised": _always_renormalised_gates,
    "sigmoid": _sigmoid_gates,
}
GATES: dict[str, Gates] = {a.router_class: _KINDS[a.gates] for a in ARCHITECTURES.values()}
"""Router class -> formula, written after its forward: for the router's own choice, its own gates to the last bit."""


def router_class(module: torch.nn.Module) -> str:
    return type(module).__name__


def find_routers(model: Any, moe_layers: Sequence[int]) -> list[torch.nn.Module]:
    """Return the router of each MoE layer, in layer order.

    Args:
        model: a ...ForCausalLM.
        moe_layers: global indices of the MoE layers from config.json.

    Raises:
        ConfigError: a router of an unknown class, or a mismatch with `moe_layers`.
    """
    routing = []
    for index, layer in enumerate(model.model.layers):
        routers = [module for module in layer.modules() if "router" in router_class(module).lower()]
        if not routers and index not in moe_layers:
            continue
        if [router_class(module) in GATES for module in routers] != [True]:
            named = routers or [module for module in layer.modules() if module is not layer]
            raise ConfigError(
                f"layer {index} of {router_class(model)} must have one router of {', '.join(GATES)}, got "
                f"{', '.join(dict.fromkeys(map(router_class, named)))}"
            )
        routing.append((index, routers[0]))
    if (built := [index for index, _ in routing]) != list(moe_layers):
        raise ConfigError(f"{router_class(model)} has routers in layers {built}, its config.json in {list(moe_layers)}")
    return [router for _, router in routing]
