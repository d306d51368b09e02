"""FSDP2's audit: the experts in the arguments of every layer's expert module.

There is no dispatcher: tokens stay on their rank, and the experts' weights are gathered.
Shape legend: t tokens, E experts, K experts per token.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from types import TracebackType
from typing import Any, Self

import torch
from torch.utils.hooks import RemovableHandle

from roll_r3.batch.route_pieces import ReadRoutes
from roll_r3.replay.audit import Audit
from roll_r3.trainers.fsdp2.model import Fsdp2Model


class ExpertsAudit(Audit):
    """Reads the arguments of transformers' expert modules: (hidden, ids [t, K], gates [t, K])."""

    def __init__(
        self, model: Fsdp2Model, num_micro_batches: int, *, layer_rows: Mapping[int, int], top_k: int, read: ReadRoutes
    ) -> None:
        """
        Args:
            num_micro_batches, layer_rows, top_k, read: see `Audit`.
        """
        super().__init__(
            [model.routers], num_micro_batches, layer_rows=layer_rows, top_k=top_k, device=model.device, read=read
        )
        layers = model.module.model.layers
        self._experts = {router.layer: layers[router.layer].mlp.experts for router in model.routers}
        self._handles: list[RemovableHandle] = []

    def __enter__(self) -> Self:
        for layer, experts in self._experts.items():
            self._handles.append(experts.register_forward_pre_hook(partial(self._called, layer)))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        super().__exit__(kind, error, trace)
        for handle in self._handles:
            handle.remove()
        self._handles = []

    @torch.no_grad()
    def _called(self, layer: int, experts: Any, inputs: tuple[torch.Tensor, torch.Tensor, torch.Tensor]) -> None:
        ids_tK = inputs[1].cpu()
        used_tE = torch.zeros(len(ids_tK), experts.num_experts, dtype=torch.bool).scatter_(1, ids_tK, True)
        self.compare(0, layer, used_tE)
