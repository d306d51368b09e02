"""One run of megatron's pipeline schedule over a list of micro-batches."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any

import numpy as np
import torch
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.pipeline_parallel import get_forward_backward_func

from roll_r3.batch.micro_batch import MicroBatch
from roll_r3.replay.observer import Observer
from roll_r3.replay.session import RoutingSession
from roll_r3.trainers.megatron.model import MegatronModel
from roll_r3.trainers.objective import Objective, TokenValues


def run_schedule(
    model: MegatronModel,
    micro_batches: Sequence[MicroBatch],
    objective: Objective,
    session: RoutingSession[Any] | None,
    *,
    forward_only: bool,
    observers: Sequence[Observer] = (),
) -> list[TokenValues]:
    """Run the forward of every micro-batch through every chunk, and backward unless `forward_only`; collective.

    Args:
        session: routing session of these micro-batches; None: routers choose by themselves.
        observers: observers of every forward and backward.

    Returns:
        The objective's values for each micro-batch on the last stage; an empty list on others.
    """
    index_of_chunk = {id(chunk): index for index, chunk in enumerate(model.chunks)}

    def forward_step(micro_batches: Iterator[MicroBatch], chunk: torch.nn.Module) -> tuple[torch.Tensor, Any]:
        micro, index = next(micro_batches), index_of_chunk[id(chunk)]
        with ExitStack() as stack:
            if session:
                stack.enter_context(session.micro_batch(index, micro))
            for observer in observers:
                stack.enter_context(observer.forward(index, micro))
            output = chunk(**_model_inputs(micro, model.device))
        for observer in observers:
            observer.await_backward(index, micro, output)
        return output, partial(_loss, objective, micro)

    model.train(not forward_only)
    iterators = [iter(micro_batches) for _ in model.chunks]
    rows, width = micro_batches[0].tokens.slots_BS.shape
    with ExitStack() as stack, torch.set_grad_enabled(not forward_only):
        for context in (session, *observers):
            if context:
                stack.enter_context(context)
        results: list[TokenValues] = get_forward_backward_func()(
            forward_step_func=forward_step,
            data_iterator=iterators if len(iterators) > 1 else iterators[0],
            model=model.chunks if len(model.chunks) > 1 else model.chunks[0],
            num_microbatches=len(micro_batches),
            # stages exchange the shapes (variable_seq_lengths), so these are only nominal
            seq_length=width,
            micro_batch_size=rows,
            forward_only=forward_only,
        )
    return results


def _loss(
    objective: Objective, micro: MicroBatch, logits: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, TokenValues]:
    """Megatron's triple of loss, tokens (unused: the loss is already divided), and data to collect."""
    loss, values = objective(micro, logits)
    return loss, torch.zeros((), dtype=torch.int), values


def _model_inputs(micro: MicroBatch, device: torch.device) -> dict[str, Any]:
    """Arguments of GPTModel.forward. No attention mask: layers are causal, and padding is on the right."""
    return {
        "input_ids": micro.tensor(micro.batch.input_ids_N, 0, device),
        "position_ids": torch.from_numpy(micro.tokens.positions_BS).to(device, non_blocking=True),
        "attention_mask": None,
        "packed_seq_params": _packed_seq_params(micro, device),
    }


def _packed_seq_params(micro: MicroBatch, device: torch.device) -> PackedSeqParams | None:
    if micro.tokens.cu_seqlens is None:
        return None
    cu_seqlens = torch.from_numpy(micro.tokens.cu_seqlens).to(device)
    longest = int(np.diff(micro.tokens.cu_seqlens).max())
    return PackedSeqParams(
        qkv_format="thd",
        cu_seqlens_q=cu_seqlens,
        cu_seqlens_kv=cu_seqlens,
        cu_seqlens_q_padded=cu_seqlens,
        cu_seqlens_kv_padded=cu_seqlens,
        max_seqlen_q=longest,
        max_seqlen_kv=longest,
    )
