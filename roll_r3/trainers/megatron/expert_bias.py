"""DeepSeek's expert bias: moved by the loads of real tokens only, with live or replayed routes.

Megatron adds a router call's routing map to `local_tokens_per_expert` if gradients are enabled. A recomputed layer runs
its forward without gradients, so every token counts once: in forward, or in the recomputation. It counts the map given
to the dispatcher, including replayed rows, but also padding slots. At the end of the schedule, finalize_model_grads
sums the counts over tensor-, context- and data-parallel ranks, moves the bias and clears the counts. Padding therefore
has to be removed after each call. The decision to skip an optimizer step comes later still, so the bias can be moved
back.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from types import TracebackType
from typing import Any, Self

import torch
from megatron.core.transformer.moe.router import TopKRouter
from torch.utils.hooks import RemovableHandle

from roll_r3.batch.token_map import PADDING
from roll_r3.trainers.backend import StepObserver


class RealTokenCounts(StepObserver):
    """Removes padding slots, and micro-batches used only to fill the pipeline, from the experts' loads."""

    def __init__(self, chunks: Sequence[torch.nn.Module]) -> None:
        super().__init__(len(chunks))
        self._routers = [[m for m in chunk.modules() if isinstance(m, TopKRouter)] for chunk in chunks]
        self._handles: list[RemovableHandle] = []
        self._biases: list[torch.Tensor] = []

    def __enter__(self) -> Self:
        self._biases = [router.expert_bias.clone() for routers in self._routers for router in routers]
        for chunk, routers in enumerate(self._routers):
            for router in routers:
                # megatron's bf16 wrapper leaves the counts in bf16, which cannot count beyond 256
                router.local_tokens_per_expert.data = router.local_tokens_per_expert.float()
                self._handles.append(router.register_forward_hook(partial(self._routed, chunk)))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        super().__exit__(kind, error, trace)
        for handle in self._handles:
            handle.remove()
        self._handles = []
        if kind is not None:  # finalize_model_grads did not run, so the counts are not cleared
            for router in (router for routers in self._routers for router in routers):
                router.local_tokens_per_expert.zero_()

    def rewind(self) -> None:
        """Undo the move of the biases at the end of the schedule."""
        routers = (router for routers in self._routers for router in routers)
        for router, bias in zip(routers, self._biases, strict=True):
            router.expert_bias.copy_(bias)

    def _routed(self, chunk: int, router: TopKRouter, inputs: Any, output: tuple[torch.Tensor, torch.Tensor]) -> None:
        if not torch.is_grad_enabled():
            return
        micro = self.current(chunk).micro
        _, map_tE = output
        if micro.counted:
            map_tE = map_tE[torch.from_numpy(micro.tokens.router_slots_t == PADDING).to(map_tE.device)]
        router.local_tokens_per_expert -= map_tE.sum(0)
