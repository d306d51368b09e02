"""One run of megatron's pipeline schedule over a list of micro-batches, and what is computed from the logits."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from megatron.core.pipeline_parallel import get_forward_backward_func

from roll_r3.algorithms.aggregation import loss_weights
from roll_r3.algorithms.policy_loss import TokenInputs, policy_loss
from roll_r3.algorithms.stats import TokenStats
from roll_r3.config.pipeline import RLVRConfig
from roll_r3.strategies.train.megatron.micro_batch import MicroBatch
from roll_r3.strategies.train.megatron.model import MegatronModel
from roll_r3.strategies.train.megatron.observer import Observer
from roll_r3.strategies.train.megatron.replay import RoutingSession
from roll_r3.strategies.train.megatron.vocab import label_log_probs_and_entropy

TokenValues = tuple[torch.Tensor, torch.Tensor]
"""Log-probabilities of the labels, and entropies; fp32 [B, S] of this rank."""
Objective = Callable[[MicroBatch, torch.Tensor], tuple[torch.Tensor, TokenValues]]
"""(micro-batch, logits [B, S, V]) -> (loss, what to return); called where the logits are."""


def run_schedule(
    model: MegatronModel,
    micro_batches: Sequence[MicroBatch],
    objective: Objective,
    session: RoutingSession[Any] | None,
    *,
    forward_only: bool,
    observers: Sequence[Observer] = (),
) -> list[TokenValues]:
    """Run every micro-batch through every chunk, and back unless `forward_only`; collective.

    Args:
        session: routes these micro-batches; None: routers choose by themselves.
        observers: watch every forward and backward.

    Returns:
        What the objective returned for each micro-batch, on the last stage; nothing elsewhere.
    """
    index_of_chunk = {id(chunk): index for index, chunk in enumerate(model.chunks)}

    def forward_step(micro_batches: Iterator[MicroBatch], chunk: torch.nn.Module) -> tuple[torch.Tensor, Any]:
        micro, index = next(micro_batches), index_of_chunk[id(chunk)]
        with ExitStack() as stack:
            if session:
                stack.enter_context(session.micro_batch(index, micro))
            for observer in observers:
                stack.enter_context(observer.forward(index, micro))
            output = chunk(**micro.model_inputs(model.device))
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
            # stages tell each other the shapes (variable_seq_lengths), so these are only nominal
            seq_length=width,
            micro_batch_size=rows,
            forward_only=forward_only,
        )
    return results


def _loss(
    objective: Objective, micro: MicroBatch, logits: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, TokenValues]:
    """Megatron's triple of loss, tokens (not used: the loss is divided already), and data to collect."""
    loss, values = objective(micro, logits)
    return loss, torch.zeros((), dtype=torch.int), values


def log_prob_objective(model: MegatronModel, temperature: float) -> Objective:
    """Log-probabilities and entropies; there is nothing to learn, so the loss is 0."""

    def objective(micro: MicroBatch, logits_BSV: torch.Tensor) -> tuple[torch.Tensor, TokenValues]:
        values = label_log_probs_and_entropy(
            logits_BSV,
            micro.tensor(micro.batch.labels_N, 0, model.device),
            temperature=temperature,
            vocab_size=model.vocab_size,
            entropy_gradient=False,
        )
        return logits_BSV.new_zeros(()), values

    return objective


def policy_objective(model: MegatronModel, config: RLVRConfig, denominator: float, stats: TokenStats) -> Objective:
    """The policy loss of each micro-batch: its share of the optimizer step's loss.

    Args:
        denominator: of the whole optimizer step, over all data-parallel ranks.
        stats: receives the token statistics.
    """

    def objective(micro: MicroBatch, logits_BSV: torch.Tensor) -> tuple[torch.Tensor, TokenValues]:
        batch = micro.batch
        assert batch.advantages_N is not None and batch.old_log_probs_N is not None
        device = model.device
        log_probs_BS, entropy_BS = label_log_probs_and_entropy(
            logits_BSV,
            micro.tensor(batch.labels_N, 0, device),
            temperature=config.actor_infer.generating_args.temperature,
            vocab_size=model.vocab_size,
            entropy_gradient=config.entropy_loss_coef > 0,
        )
        reference = batch.ref_log_probs_N
        tokens = TokenInputs(
            mask=micro.tensor(batch.loss_mask_N, False, device),
            advantages=micro.tensor(batch.advantages_N, 0, device),
            old_log_probs=micro.tensor(batch.old_log_probs_N, 0, device),
            rollout_log_probs=micro.tensor(batch.rollout_log_probs_N, 0, device),
            ref_log_probs=None if reference is None else micro.tensor(reference, 0, device),
        )
        if not micro.counted:  # every weight takes part, with no gradient
            return logits_BSV.sum() * 0.0, (log_probs_BS.detach(), entropy_BS.detach())
        losses_BS = policy_loss(log_probs_BS, entropy_BS, tokens, config, stats)
        weights_BS = micro.tensor(loss_weights(batch, config.loss_agg_mode), 0, device)
        loss = (losses_BS * weights_BS).sum() / denominator
        return loss, (log_probs_BS.detach(), entropy_BS.detach())

    return objective
