"""Forward and backward passes of a list of micro-batches."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

import torch

from roll_r3.batch.micro_batch import MicroBatch
from roll_r3.errors import RollError
from roll_r3.replay.observer import Observer
from roll_r3.replay.session import RoutingSession
from roll_r3.trainers.fsdp2.model import Fsdp2Model
from roll_r3.trainers.objective import Objective, TokenValues


def run_micro_batches(
    model: Fsdp2Model,
    micro_batches: Sequence[MicroBatch],
    objective: Objective,
    session: RoutingSession[Any] | None,
    *,
    forward_only: bool,
    observers: Sequence[Observer] = (),
) -> list[TokenValues]:
    """Run the forward of every micro-batch, and backward unless `forward_only`; collective.

    Args:
        micro_batches: the same number on every rank, because ranks gather each layer's weights together.
        session: routing session of these micro-batches; None: routers choose by themselves.
        observers: observers of every forward and backward.

    Returns:
        The objective's values for each micro-batch.

    Raises:
        RollError: an earlier backward of this model failed.
    """
    if model.in_backward:
        raise RollError("a backward of this model failed, and FSDP2 would compute wrong gradients now: restart")
    results = []
    model.module.train(not forward_only)
    with ExitStack() as stack:
        stack.callback(model.reshard)
        for context in (session, *observers):
            if context:
                stack.enter_context(context)
        stack.enter_context(torch.set_grad_enabled(not forward_only))
        for micro in micro_batches:
            with ExitStack() as forward:
                if session:
                    forward.enter_context(session.micro_batch(0, micro))
                for observer in observers:
                    forward.enter_context(observer.forward(0, micro))
                logits_BSV = model.module(**_inputs(micro, model.device)).logits
            for observer in observers:
                observer.await_backward(0, micro, logits_BSV)
            loss, values = objective(micro, logits_BSV)
            if not forward_only:
                model.in_backward = True
                loss.backward()
                model.in_backward = False
            results.append(values)
    return results


def _inputs(micro: MicroBatch, device: torch.device) -> dict[str, Any]:
    """Arguments of the model's forward.

    No attention mask: layers are causal, and padding is at the right of its row or sample. If positions restart within
    a row (at each packed sample), transformers makes a mask to separate the samples.
    """
    return {
        "input_ids": micro.tensor(micro.batch.input_ids_N, 0, device),
        "position_ids": torch.from_numpy(micro.tokens.positions_BS).to(device, non_blocking=True),
        "use_cache": False,
    }
