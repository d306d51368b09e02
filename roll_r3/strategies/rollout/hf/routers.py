"""The experts that transformers' routers choose, by hooks: nothing of the model is changed.

Shape legend: N tokens of a forward, M MoE layers, K experts per token.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from roll_r3.errors import ConfigError

ROUTERS = frozenset(
    {
        "DeepseekV3TopkRouter",
        "MixtralTopKRouter",
        "OlmoeTopKRouter",
        "Qwen2MoeTopKRouter",
        "Qwen3MoeTopKRouter",
    }
)
"""Classes of transformers 5 whose forward returns (logits, gates, expert ids [N, K])."""


def find_routers(model: torch.nn.Module, moe_layers: Sequence[int]) -> list[torch.nn.Module]:
    """The router of each MoE layer, in their order.

    Args:
        model: a causal language model of transformers.
        moe_layers: global indices of the layers that must route.

    Raises:
        ConfigError: a layer's router is of no known class, or other layers route.
    """
    layers = model.get_submodule("model.layers")
    found = {
        index: [m for m in layer.modules() if type(m).__name__ in ROUTERS]
        for index, layer in enumerate(layers.children())
    }
    for index in moe_layers:
        if len(found.get(index, [])) != 1:
            kinds = sorted({type(m).__name__ for m in layers.get_submodule(str(index)).modules() if m is not layers})
            raise ConfigError(
                f"hf_infer cannot record the routes of {type(model).__name__}: layer {index} holds "
                f"{len(found.get(index, []))} routers that are known ({', '.join(sorted(ROUTERS))}); its modules are "
                f"{', '.join(kinds)}"
            )
    routing = [index for index, routers in found.items() if routers]
    if routing != list(moe_layers):
        raise ConfigError(f"{type(model).__name__} routes in layers {routing}, its config.json says {list(moe_layers)}")
    return [found[index][0] for index in moe_layers]


class RouteRecorder:
    """What the routers chose since `take` was called last."""

    def __init__(self, routers: Sequence[torch.nn.Module]) -> None:
        self._chosen: list[list[torch.Tensor]] = [[] for _ in routers]
        for layer, router in enumerate(routers):
            router.register_forward_hook(self._hook(layer))

    def _hook(self, layer: int) -> Callable[..., None]:
        def record(module: torch.nn.Module, inputs: Any, output: tuple[torch.Tensor, ...]) -> None:
            self._chosen[layer].append(output[2])

        return record

    def take(self) -> torch.Tensor:
        """Expert ids of the one forward since. [M, N, K] on the CPU"""
        assert {len(forwards) for forwards in self._chosen} == {1}, "one forward, every router once"
        ids_MNK = torch.stack([forwards.pop() for forwards in self._chosen])
        return ids_MNK.cpu()
