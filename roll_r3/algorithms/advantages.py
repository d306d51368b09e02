"""Advantages of responses, from their scores, and of tokens, minus the KL penalty.

Shape legend: n samples, N inputs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from roll_r3.algorithms.kl import kl_estimate
from roll_r3.batch.batch import Batch, FloatN
from roll_r3.config.algorithm import AlgorithmConfig

EPSILON = 1e-6
"""Added to a group's standard deviation, so that a group of equal rewards has advantage 0."""


@dataclass(frozen=True)
class TokenAdvantages:
    """Advantages of a step's tokens, with their terms."""

    advantages_N: FloatN
    """0 where the loss mask is False."""
    rewards_n: npt.NDArray[np.float64]
    """Normalised score of each scored sample, minus the penalty of its whole response."""
    penalty_n: npt.NDArray[np.float64] | None
    """init_kl_coef x KL of each scored sample's response, nats; None without a penalty."""
    penalty_clamped: float | None
    """Share of trained tokens with a clamped log ratio to the reference; None without a penalty."""


def token_advantages(
    batch: Batch,
    scores_n: npt.NDArray[np.float64],
    groups: Sequence[str],
    domains: Sequence[str],
    config: AlgorithmConfig,
) -> TokenAdvantages:
    """Compute the advantages of trained tokens: the response's, minus the KL penalty of this and later tokens.

    As in ROLL the penalty follows the normalisation: its weight is init_kl_coef, independent of the group.
    Earlier penalties are left out, as they do not depend on the token.

    Args:
        batch: needs the log-probabilities of policy and reference with `add_token_level_kl`. Samples after the scored
            ones are fillers with advantage 0.
        scores_n: rewards.
        groups: group of each scored sample: its prompt.
        domains: domain of each scored sample. Norms over a batch, and whitening, are within a domain, as in ROLL.
    """
    rewards_n = np.zeros(batch.num_samples)
    rewards_n[: len(scores_n)] = response_advantages(scores_n, groups, config)
    advantages_N, penalty_n, clamped = batch.per_sample(rewards_n), None, None
    if config.add_token_level_kl:
        penalty_N, clamped = _kl_penalty(batch, config)
        advantages_N = advantages_N - _sum_to_end(batch, penalty_N)
        penalty_n = batch.sum_per_sample(penalty_N)
        rewards_n = rewards_n - penalty_n
        penalty_n = penalty_n[: len(scores_n)]
    if config.advantage_clip is not None:
        advantages_N = np.clip(advantages_N, -config.advantage_clip, config.advantage_clip)
    masked_N = np.where(batch.loss_mask_N, advantages_N, 0.0).astype(np.float32)
    return TokenAdvantages(masked_N, rewards_n[: len(scores_n)], penalty_n, clamped)


def response_advantages(
    scores_n: npt.NDArray[np.float64], groups: Sequence[str], config: AlgorithmConfig
) -> npt.NDArray[np.float64]:
    """Compute one advantage per sample, before the KL penalty and `advantage_clip`.

    grpo: (score - mean of its group) / (standard deviation of its group + 1e-6), Shao et al. 2024 (arXiv 2402.03300),
    with the sample deviation (n - 1); without the division it is Dr. GRPO's (Liu et al. 2025, arXiv 2503.20783).
    reinforce: score - mean of the batch. A group of one sample has advantage 0 under grpo.

    Args:
        scores_n: rewards.
        groups: group of each sample: its prompt.
    """
    if config.adv_estimator == "reinforce":
        centred_n: npt.NDArray[np.float64] = scores_n - scores_n.mean()
        return centred_n
    advantages_n = np.zeros_like(scores_n)
    _, index_n = np.unique(np.asarray(groups), return_inverse=True)
    for group in range(index_n.max() + 1):
        members = np.flatnonzero(index_n == group)
        centred = scores_n[members] - scores_n[members].mean()
        if config.norm_adv_by_std_in_grpo and len(members) > 1:
            centred = centred / (scores_n[members].std(ddof=1) + EPSILON)
        advantages_n[members] = centred
    return advantages_n


def _kl_penalty(batch: Batch, config: AlgorithmConfig) -> tuple[npt.NDArray[np.float64], float]:
    """Compute init_kl_coef x KL of each trained token (float64 [N]), and the share of clamped ones."""
    assert batch.old_log_probs_N is not None and batch.ref_log_probs_N is not None
    old, ref = (torch.from_numpy(x).double() for x in (batch.old_log_probs_N, batch.ref_log_probs_N))
    kl, clamped = kl_estimate(old, ref, config.kl_penalty)
    kl_N = np.where(batch.loss_mask_N, kl.numpy(), 0.0)
    return config.init_kl_coef * kl_N, float(clamped.numpy()[batch.loss_mask_N].mean())


def _sum_to_end(batch: Batch, values_N: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Sum each input and the later inputs of its sample: float64 [N]."""
    sums = np.concatenate([np.zeros(1), np.cumsum(values_N)])
    to_end_N: npt.NDArray[np.float64] = batch.per_sample(sums[batch.offsets[1:]]) - sums[:-1]
    return to_end_N
