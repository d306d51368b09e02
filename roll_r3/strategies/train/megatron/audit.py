"""The audit: the experts that every layer's dispatcher really used, against the rows recorded for the same tokens.

It shares nothing with what the routing session stages. What was used is read from the dispatcher after it decided, in
forward and again where backward recomputes the layer; what should have been used comes from each token's sample and
position; which micro-batch runs comes from the schedule and from autograd (see `Observer`).

Shape legend: t tokens that this rank's routers see, E experts, K experts per token, M rows of a sample's routes on the
layer axis.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from functools import partial
from types import TracebackType
from typing import Any, Self

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist
from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.core.transformer.moe.token_dispatcher import MoEAllGatherTokenDispatcher, MoEAlltoAllTokenDispatcher

from roll_r3.batch.routes import RoutedExperts
from roll_r3.batch.token_map import PADDING
from roll_r3.errors import ConfigError, ReplayError
from roll_r3.strategies.train.megatron.bridge import unwrap
from roll_r3.strategies.train.megatron.model import MegatronModel
from roll_r3.strategies.train.megatron.observer import Observer, Pass
from roll_r3.strategies.train.micro_batch import MicroBatch

_WRAPPED = ("dispatch_preprocess", "dispatch_postprocess")


class DispatchAudit(Observer):
    """Compares one schedule's dispatch with `batch.routes` of its micro-batches.

    Example:
        audit = DispatchAudit(model, len(micro_batches), layer_rows=rows, top_k=k)
        run_schedule(model, micro_batches, objective, session, forward_only=False, observers=[audit])
        audit.verify()
    """

    def __init__(
        self, model: MegatronModel, num_micro_batches: int, *, layer_rows: Mapping[int, int], top_k: int
    ) -> None:
        """
        Args:
            num_micro_batches: that each chunk will run.
            layer_rows: global layer -> its row on axis M of the routes.

        Raises:
            ConfigError: a token dispatcher that does not show its decision.
        """
        super().__init__(len(model.chunks))
        self.audited = 0
        """(token, layer) entries of this rank that were compared; a recomputation compares them again."""
        self.audit_equal = 0
        """Those of them whose token went to exactly the recorded experts."""
        self._model = model
        self._num_micro_batches = num_micro_batches
        self._layer_rows = layer_rows
        self._top_k = top_k
        self._layers = [
            [module for module in unwrap(chunk).decoder.modules() if isinstance(module, MoELayer)]
            for chunk in model.chunks
        ]
        self._dispatches: Counter[int] = Counter()
        self._arrivals: dict[int, torch.Tensor] = {}
        """Layer -> tokens that each expert should receive from all ranks of its group; int64 [E]."""
        self._faults = 0
        self._first_fault = ""
        for layer in self._all_layers():
            if not isinstance(layer.token_dispatcher, MoEAlltoAllTokenDispatcher | MoEAllGatherTokenDispatcher):
                raise ConfigError(
                    "actor_train.router_replay.audit is true, but the dispatcher of moe_token_dispatcher_type "
                    f"{model.config.moe_token_dispatcher_type} does not show which experts it used: set "
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
        for layer in self._all_layers():
            for name in _WRAPPED:
                vars(layer.token_dispatcher).pop(name, None)

    def verify(self) -> None:
        """Judge the schedule that ended; collective over the world, and alike on every rank.

        Raises:
            ReplayError: a token went to other experts than its row says, a slot without a row not to k distinct ones,
                experts received other numbers of tokens, or a layer was not dispatched as often as it had to be.
        """
        self._check_complete()
        counts = torch.tensor([self._faults, self.audited, self.audit_equal], device=self._model.device)
        dist.all_reduce(counts)
        faults, audited, equal = counts.tolist()
        if not faults:
            return
        found: list[str] = [""] * dist.get_world_size()
        dist.all_gather_object(found, self._first_fault)
        raise ReplayError(
            f"the audit of the dispatch found {audited - equal} of {audited} (token, layer) entries that went to other "
            f"experts than recorded, and {faults} faults in all. The first of each rank: "
            + "; ".join(f"rank {rank}: {text}" for rank, text in enumerate(found) if text)
        )

    def _all_layers(self) -> list[Any]:
        return [layer for layers in self._layers for layer in layers]

    def _fault(self, count: int, text: str) -> None:
        self._faults += count
        self._first_fault = self._first_fault or text

    @torch.no_grad()
    def _decided(self, chunk: int, layer: Any, result: Any) -> None:
        """The dispatcher decided where this rank's tokens go."""
        current = self.current(chunk)
        number = layer.layer_number - 1
        used_tE = layer.token_dispatcher.routing_map.cpu()
        expected_tE, known_t = self._recorded(current.micro, self._layer_rows[number], used_tE.size(-1))
        self._dispatches[number] += 1
        if len(expected_tE) != len(used_tE):
            raise ReplayError(
                f"layer {number} dispatched {len(used_tE)} tokens of a micro-batch whose map has {len(expected_tE)}"
            )
        same_t = (used_tE == expected_tE).all(-1)
        if wrong := (known_t & ~same_t).nonzero().flatten().tolist():
            self._fault(len(wrong), _mismatch(number, current, wrong[0], used_tE, expected_tE))
        short_t = ~known_t & (used_tE.sum(-1) != self._top_k)
        if short := short_t.nonzero().flatten().tolist():
            self._fault(
                len(short),
                f"layer {number} sent slot {short[0]}, which has no row, to {int(used_tE[short[0]].sum())} distinct "
                f"experts instead of {self._top_k}",
            )
        self.audited += int(known_t.sum())
        self.audit_equal += int((known_t & same_t).sum())
        arrivals_E = torch.where(known_t[:, None], expected_tE, used_tE).sum(0).to(self._model.device)
        group = layer.token_dispatcher.tp_ep_group
        if group.size() > 1:
            dist.all_reduce(arrivals_E, group=group)
        self._arrivals[number] = arrivals_E

    @torch.no_grad()
    def _arrived(self, chunk: int, layer: Any, result: tuple[torch.Tensor, torch.Tensor, torch.Tensor]) -> None:
        """The tokens of this rank's experts have come, from every rank of their group."""
        number = layer.layer_number - 1
        tokens, per_expert, _ = result
        received = torch.as_tensor(per_expert).tolist()
        expected = self._arrivals.pop(number).cpu()[layer.local_expert_indices].tolist()
        if received != expected or len(tokens) != sum(expected):
            self._fault(
                1,
                f"layer {number}: experts {layer.local_expert_indices} received {received} tokens ({len(tokens)} "
                f"rows), the recorded rows say {expected}",
            )

    def _recorded(self, micro: MicroBatch, row: int, num_experts: int) -> tuple[torch.Tensor, torch.Tensor]:
        """What the routes say of each slot: experts as bool [t, E], and where they say anything [t]."""
        batch = micro.batch
        assert batch.routes is not None
        offsets, slots_t = batch.offsets, micro.tokens.router_slots_t
        sample_t = np.searchsorted(offsets, slots_t, side="right") - 1
        expected_tE = np.zeros((len(slots_t), num_experts), np.bool_)
        known_t: npt.NDArray[np.bool_] = slots_t != PADDING
        for sample, routes in enumerate(batch.routes):
            assert isinstance(routes, RoutedExperts)
            (at,) = np.nonzero((sample_t == sample) & (slots_t != PADDING))
            positions = slots_t[at] - offsets[sample]
            expected_tE[at[:, None], routes.ids_MRK[row, positions]] = True
            if routes.known_R is not None:
                known_t[at] = routes.known_R[positions]
        return torch.from_numpy(expected_tE), torch.from_numpy(known_t)

    def _check_complete(self) -> None:
        """Every layer was seen in every forward and every recomputation."""
        for router in (router for routers in self._model.routers for router in routers):
            wanted = self._num_micro_batches * (2 if router.recomputed else 1)
            if self._dispatches[router.layer] != wanted:
                self._fault(
                    1, f"layer {router.layer} dispatched {self._dispatches[router.layer]} times instead of {wanted}"
                )


def _followed_by(method: Callable[..., Any], look: Callable[[Any], None]) -> Callable[..., Any]:
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        result = method(*args, **kwargs)
        look(result)
        return result

    return wrapped


def _mismatch(layer: int, current: Pass, token: int, used_tE: torch.Tensor, expected_tE: torch.Tensor) -> str:
    batch = current.micro.batch
    slot = int(current.micro.tokens.router_slots_t[token])
    sample = int(np.searchsorted(batch.offsets, slot, side="right")) - 1
    return (
        f"layer {layer}, sample {batch.sample_ids[sample]}, position {slot - int(batch.offsets[sample])} "
        f"({'recomputed in backward' if current.backward else 'forward'}): recorded experts "
        f"{expected_tE[token].nonzero().flatten().tolist()}, used {used_tE[token].nonzero().flatten().tolist()}"
    )
