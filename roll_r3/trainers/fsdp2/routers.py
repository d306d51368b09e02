"""The hook of a routing session in transformers' routers.

It replaces the ids returned by a router and computes the gates again from the live logits, like this class of router.
Shape legend: t tokens, E experts, K experts per token.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch.utils.hooks import RemovableHandle

from roll_r3.models.hf.routers import GATES, RouterOutput, router_class
from roll_r3.replay.layer import RoutedLayer


class HookedRouter:
    """One router of a live model (a `Router`)."""

    def __init__(self, module: torch.nn.Module, layer: int, *, recomputed: bool) -> None:
        """
        Args:
            module: a router of a class in `GATES`.
            recomputed: backward runs it again.
        """
        self.module = module
        self.layer = layer
        self.recomputed = recomputed
        self._gates = GATES[router_class(module)]
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
