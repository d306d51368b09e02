"""Values computed from a micro-batch's logits: log-probabilities, or its share of the policy loss."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt
import torch

from roll_r3.algorithms.aggregation import loss_weights
from roll_r3.algorithms.losses.base import TokenInputs
from roll_r3.algorithms.losses.policy_loss import policy_loss
from roll_r3.algorithms.losses.sample_sums import AddUp, SampleSums
from roll_r3.algorithms.stats import TokenStats
from roll_r3.batch.batch import Batch
from roll_r3.batch.micro_batch import KeptSlots, MicroBatch
from roll_r3.config.algorithm import AlgorithmConfig
from roll_r3.trainers.finite import LossSum

TokenValues = tuple[torch.Tensor, torch.Tensor]
"""Log-probabilities of the labels, and entropies, in nats; fp32 [B, S] of this rank."""
Objective = Callable[[MicroBatch, torch.Tensor], tuple[torch.Tensor, TokenValues]]
"""(micro-batch, logits [B, S, V]) -> (loss, values to return); called on the ranks with the logits."""
LabelValues = Callable[[torch.Tensor, torch.Tensor, KeptSlots | None, bool], TokenValues]
"""(logits [B, S, V], labels [B, S], sets of the labels, True for a differentiable entropy) -> values under the sampling
temperature."""


def log_prob_objective(token_values: LabelValues, device: torch.device) -> Objective:
    """Return the objective of a pass without gradients: log-probabilities and entropies, with a loss of 0."""

    def objective(micro: MicroBatch, logits_BSV: torch.Tensor) -> tuple[torch.Tensor, TokenValues]:
        labels_BS = micro.tensor(micro.batch.labels_N, 0, device)
        values = token_values(logits_BSV, labels_BS, micro.kept(device), False)
        return logits_BSV.new_zeros(()), values

    return objective


def policy_objective(
    token_values: LabelValues,
    device: torch.device,
    config: AlgorithmConfig,
    denominator: float,
    stats: TokenStats,
    total: LossSum,
    add_up: AddUp,
) -> Objective:
    """Return the objective of training: each micro-batch's share of the optimizer step's loss.

    In a batch without old log-probabilities the live ones, detached, take their place: the ratio is exactly 1.

    Args:
        denominator: denominator of the whole optimizer step, over all data-parallel ranks.
        stats: receives the token statistics and the terms of the loss.
        total: receives the losses.
        add_up: adds up sums of samples over the ranks of a micro-batch (`Backend.sum_over_context_ranks`).
    """

    def objective(micro: MicroBatch, logits_BSV: torch.Tensor) -> tuple[torch.Tensor, TokenValues]:
        batch = micro.batch
        assert batch.advantages_N is not None
        labels_BS, kept = micro.tensor(batch.labels_N, 0, device), micro.kept(device)
        log_probs_BS, entropy_BS = token_values(logits_BSV, labels_BS, kept, config.entropy_loss_coef > 0)
        old, reference, pg_weights = batch.old_log_probs_N, batch.ref_log_probs_N, batch.pg_weights_N
        tokens = TokenInputs(
            mask=micro.tensor(batch.loss_mask_N, False, device),
            advantages=micro.tensor(batch.advantages_N, 0, device),
            old_log_probs=log_probs_BS.detach() if old is None else micro.tensor(old, 0, device),
            ref_log_probs=None if reference is None else micro.tensor(reference, 0, device),
            pg_weights=None if pg_weights is None else micro.tensor(pg_weights, 0, device),
            weights=micro.tensor(loss_weights(batch, config), 0, device) / denominator,
            scores=None if batch.scores_n is None else micro.tensor(batch.per_sample(batch.scores_n), 0, device),
            sums=SampleSums(micro, device, add_up),
        )
        if not micro.counted:  # every weight takes part, with no gradient
            return logits_BSV.sum() * 0.0, (log_probs_BS.detach(), entropy_BS.detach())
        if kept is not None:
            with torch.no_grad():
                whole_BS, _ = token_values(logits_BSV, labels_BS, None, False)
            _count_kept(stats, kept, tokens.mask, whole_BS - log_probs_BS.detach())
        losses_BS = policy_loss(log_probs_BS, entropy_BS, tokens, config, stats)
        loss = (losses_BS * tokens.weights).sum()
        stats.add_share("actor/loss", loss)
        total.add(loss)
        return loss, (log_probs_BS.detach(), entropy_BS.detach())

    return objective


def _count_kept(stats: TokenStats, kept: KeptSlots, mask_BS: torch.Tensor, log_mass_BS: torch.Tensor) -> None:
    """Add the statistics of the sets of trained tokens.

    Args:
        log_mass_BS: log-probability of a label in the whole vocabulary, less that in its set: log of the set's mass.
    """
    has_set_BS = kept.sizes_BS > 0
    stats.add("sampling_mask/coverage", has_set_BS, mask_BS)
    stats.add("sampling_mask/mean_size", kept.sizes_BS, mask_BS & has_set_BS)
    stats.add("sampling_mask/mass", log_mass_BS.exp(), mask_BS & has_set_BS)


def placed(batch: Batch, micro_batches: Sequence[MicroBatch], values: Sequence[TokenValues]) -> npt.NDArray[np.float32]:
    """Return (log-probability, entropy) of every input of the batch; 0 for inputs of other ranks. fp32 [N, 2]

    Args:
        micro_batches: all micro-batches of `batch`.
        values: values of each of them.
    """
    found_N2 = np.zeros((int(batch.lengths_n.sum()), 2), np.float32)
    for micro, pair in zip(micro_batches, values, strict=True):
        if micro.counted:
            part = micro.tokens.scatter(torch.stack(pair, dim=-1).cpu().numpy())
            found_N2[batch.inputs_of(micro.samples)] = part
    return found_N2
