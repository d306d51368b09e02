"""Megatron's audit: the decision of every layer's token dispatcher, and the tokens received by its experts.

Shape legend: t tokens seen by this rank's routers, E experts.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from types import TracebackType
from typing import Any, Self

import torch
import torch.distributed as dist
from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.core.transformer.moe.token_dispatcher import MoEAllGatherTokenDispatcher, MoEAlltoAllTokenDispatcher

from roll_r3.batch.route_pieces import ReadRoutes
from roll_r3.errors import ConfigError
from roll_r3.replay.audit import Audit
from roll_r3.trainers.megatron.bridge import unwrap
from roll_r3.trainers.megatron.model import MegatronModel

_WRAPPED = ("dispatch_preprocess", "dispatch_postprocess")


class DispatchAudit(Audit):
    """Reads the dispatchers of every chunk. A wrong number of tokens received by an expert is a fault too."""

    def __init__(
        self,
        model: MegatronModel,
        num_micro_batches: int,
        *,
        layer_rows: Mapping[int, int],
        top_k: int,
        read: ReadRoutes,
    ) -> None:
        """
        Args:
            num_micro_batches, layer_rows, top_k, read: see `Audit`.

        Raises:
            ConfigError: the type of token dispatcher does not expose its decision.
        """
        super().__init__(
            model.routers, num_micro_batches, layer_rows=layer_rows, top_k=top_k, device=model.device, read=read
        )
        self._layers = [
            [module for module in unwrap(chunk).decoder.modules() if isinstance(module, MoELayer)]
            for chunk in model.chunks
        ]
        self._arrivals: dict[int, torch.Tensor] = {}
        """Layer -> number of tokens expected by each expert from all ranks of its group; int64 [E]."""
        for layer in self._all_layers():
            if not isinstance(layer.token_dispatcher, MoEAlltoAllTokenDispatcher | MoEAllGatherTokenDispatcher):
                raise ConfigError(
                    "actor_train.router_replay.audit is true, but the dispatcher of moe_token_dispatcher_type "
                    f"{model.config.moe_token_dispatcher_type} does not expose the experts it used: set "
                    "moe_token_dispatcher_type to alltoall or allgather, or audit to false"
                )

    def __enter__(self) -> Self:
        for chunk, layers in enumerate(self._layers):
            for layer in layers:
                dispatcher = layer.token_dispatcher
                for name, look in zip(_WRAPPED, (self._decided, self._arrived), strict=True):
                    setattr(dispatcher, name, _followed_by(getattr(dispatcher, name), partial(look, chunk, layer)))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        super().__exit__(kind, error, trace)
        for layer in self._all_layers():
            for name in _WRAPPED:
                vars(layer.token_dispatcher).pop(name, None)

    def _all_layers(self) -> list[Any]:
        return [layer for layers in self._layers for layer in layers]

    @torch.no_grad()
    def _decided(self, chunk: int, layer: Any, result: Any) -> None:
        """Check the dispatcher's decision for this rank's tokens."""
        number = layer.layer_number - 1
        expected_tE = self.compare(chunk, number, layer.token_dispatcher.routing_map.cpu())
        arrivals_E = expected_tE.sum(0).to(self._device)
        group = layer.token_dispatcher.tp_ep_group
        if group.size() > 1:
            dist.all_reduce(arrivals_E, group=group)
        self._arrivals[number] = arrivals_E

    @torch.no_grad()
    def _arrived(self, chunk: int, layer: Any, result: tuple[torch.Tensor, torch.Tensor, torch.Tensor]) -> None:
        """Check the tokens received by this rank's experts from every rank of their group."""
        number = layer.layer_number - 1
        tokens, per_expert, _ = result
        received = torch.as_tensor(per_expert).tolist()
        expected = self._arrivals.pop(number).cpu()[layer.local_expert_indices].tolist()
        if received != expected or len(tokens) != sum(expected):
            self.fault(
                1,
                f"layer {number}: experts {layer.local_expert_indices} received {received} tokens ({len(tokens)} "
                f"rows), but the recorded rows give {expected}",
            )


def _followed_by(method: Callable[..., Any], look: Callable[[Any], None]) -> Callable[..., Any]:
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        result = method(*args, **kwargs)
        look(result)
        return result

    return wrapped
