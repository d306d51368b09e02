"""Recording of the experts chosen by transformers' routers, with hooks and without changes to the model.

Shape legend: N tokens of a forward, M MoE layers, K experts per token.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from roll_r3.errors import RouteError
from roll_r3.models.hf.routers import RouterOutput


class RouteRecorder:
    """Choices of the routers since the last call of `take` or `clear`."""

    def __init__(self, routers: Sequence[torch.nn.Module]) -> None:
        self._chosen: list[list[torch.Tensor]] = [[] for _ in routers]
        for layer, router in enumerate(routers):
            router.register_forward_hook(self._hook(layer))

    def _hook(self, layer: int) -> Callable[..., None]:
        def record(module: torch.nn.Module, inputs: Any, output: RouterOutput) -> None:
            self._chosen[layer].append(output[2])

        return record

    def clear(self) -> None:
        """Discard the choices of a failed forward."""
        for forwards in self._chosen:
            forwards.clear()

    def take(self) -> torch.Tensor:
        """Return the expert ids of the one forward since then. [M, N, K] on the CPU

        Raises:
            RouteError: a router did not run exactly once.
        """
        calls = [len(forwards) for forwards in self._chosen]
        if set(calls) != {1}:
            raise RouteError(f"the routers of the MoE layers ran {calls} times; each must run once in a forward")
        ids_MNK = torch.stack([forwards.pop() for forwards in self._chosen])
        return ids_MNK.cpu()
