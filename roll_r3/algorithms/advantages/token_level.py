"""Advantages of tokens: normalised rewards, minus the KL penalty, whitened and clipped.

The order is that of ROLL's `reward_postprocess`, `compute_token_reward` and `compute_advantage`.

Shape legend: n samples, N inputs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from roll_r3.algorithms.advantages.base import Float64n, Members, ScoredSamples
from roll_r3.algorithms.advantages.estimators import ESTIMATORS
from roll_r3.algorithms.advantages.moments import whitened
from roll_r3.algorithms.kl import kl_estimate
from roll_r3.batch.batch import Batch, FloatN
from roll_r3.config.algorithm import AlgorithmConfig

BoolN = npt.NDArray[np.bool_]
Float64N = npt.NDArray[np.float64]


@dataclass(frozen=True)
class TokenAdvantages:
    """Advantages of a step's tokens, with their terms."""

    advantages_N: FloatN
    """0 where the loss mask is False."""
    rewards_n: Float64n
    """Normalised score of each scored sample, minus the penalty of its whole response."""
    penalty_n: Float64n | None
    """init_kl_coef x KL of each scored sample's response, nats; None without a penalty."""
    penalty_clamped: float | None
    """Share of trained tokens with a clamped log ratio to the reference; None without a penalty."""
    metrics: dict[str, float]
    """Shares of clipped values, by metric name."""


def token_advantages(
    batch: Batch, scores_n: Float64n, groups: Sequence[str], domains: Sequence[str], config: AlgorithmConfig
) -> TokenAdvantages:
    """Compute the advantages of trained tokens: the response's, minus the KL penalty of this and later tokens.

    As in ROLL the penalty follows the normalisation: its weight is init_kl_coef, independent of the group.
    Earlier penalties are left out, as they do not depend on the token.

    Args:
        batch: needs the log-probabilities of policy and reference with `add_token_level_kl`. Samples after the scored
            ones are fillers with advantage 0. Masked samples have no trained token, but their scores count in means
            and deviations.
        scores_n: shaped scores.
        groups: group of each scored sample: its prompt.
        domains: domain of each scored sample. Norms over a batch, and whitening, are within a domain, as in ROLL.
    """
    samples, estimator = ScoredSamples.of(scores_n, groups, domains), ESTIMATORS[config.adv_estimator]
    rewards_n, metrics = np.zeros(batch.num_samples), dict[str, float]()
    rewards_n[: len(scores_n)] = _clipped(
        estimator.rewards(samples, config), config.reward_clip, metrics, "critic/reward_clip_frac"
    )
    advantages_N, penalty_n, clamped = batch.per_sample(rewards_n), None, None
    if config.add_token_level_kl:
        penalty_N, clamped = _kl_penalty(batch, config)
        penalty_n = batch.sum_per_sample(penalty_N)[: len(scores_n)]
        if config.reward_clip is not None:
            penalty_N = _within_clip(batch, rewards_n, penalty_N, config.reward_clip, metrics)
        advantages_N = advantages_N - _sum_to_end(batch, penalty_N)
        rewards_n = rewards_n - batch.sum_per_sample(penalty_N)
    masks = [batch.loss_mask_N] if estimator.whitens_step else []
    if config.whiten_advantages:
        masks += [batch.loss_mask_N & _inputs_of(batch, members) for members in samples.domains]
    for mask_N in masks:
        advantages_N[mask_N] = whitened(advantages_N[mask_N])
    masked_N = np.zeros_like(advantages_N, np.float32)
    trained = _clipped(advantages_N[batch.loss_mask_N], config.advantage_clip, metrics, "critic/advantage_clip_frac")
    masked_N[batch.loss_mask_N] = trained.astype(np.float32)
    return TokenAdvantages(masked_N, rewards_n[: len(scores_n)], penalty_n, clamped, metrics)


def _clipped(values: Float64n, limit: float | None, metrics: dict[str, float], name: str) -> Float64n:
    """Clip to [-limit, limit] and add the share of clipped values to the metrics; None: do neither."""
    if limit is None:
        return values
    metrics[name] = _share(np.abs(values) > limit)
    clipped: Float64n = np.clip(values, -limit, limit)
    return clipped


def _within_clip(
    batch: Batch, rewards_n: Float64n, penalty_N: Float64N, limit: float, metrics: dict[str, float]
) -> Float64N:
    """Return the penalties left after clipping the rewards of tokens: float64 [N].

    A token's reward is its penalty, negative; the last trained token of a sample also has the sample's reward.
    """
    ends_N = _last_trained(batch)
    given_N = np.where(ends_N, batch.per_sample(rewards_n), 0.0)
    rewards_N = given_N - penalty_N
    metrics["critic/token_reward_clip_frac"] = _share(np.abs(rewards_N[batch.loss_mask_N]) > limit)
    left_N: Float64N = given_N - np.clip(rewards_N, -limit, limit)
    return left_N


def _last_trained(batch: Batch) -> BoolN:
    """Return True at the last trained token of each sample with one: bool [N]."""
    trained = np.flatnonzero(batch.loss_mask_N)
    rows = batch.per_sample(np.arange(batch.num_samples))[trained]
    ends_N = np.zeros(len(batch.loss_mask_N), np.bool_)
    ends_N[trained[np.append(rows[1:] != rows[:-1], True)[: len(trained)]]] = True
    return ends_N


def _kl_penalty(batch: Batch, config: AlgorithmConfig) -> tuple[Float64N, float]:
    """Compute init_kl_coef x KL of each trained token (float64 [N]), and the share of clamped ones."""
    assert batch.old_log_probs_N is not None and batch.ref_log_probs_N is not None
    old, ref = (torch.from_numpy(x).double() for x in (batch.old_log_probs_N, batch.ref_log_probs_N))
    kl, clamped = kl_estimate(old, ref, config.kl_penalty)
    kl_N = np.where(batch.loss_mask_N, kl.numpy(), 0.0)
    return config.init_kl_coef * kl_N, _share(clamped.numpy()[batch.loss_mask_N])


def _sum_to_end(batch: Batch, values_N: Float64N) -> Float64N:
    """Sum each input and the later inputs of its sample: float64 [N]."""
    sums = np.concatenate([np.zeros(1), np.cumsum(values_N)])
    to_end_N: Float64N = batch.per_sample(sums[batch.offsets[1:]]) - sums[:-1]
    return to_end_N


def _inputs_of(batch: Batch, members: Members) -> BoolN:
    """Return True at the inputs of these samples: bool [N]."""
    chosen_n = np.zeros(batch.num_samples, np.bool_)
    chosen_n[members] = True
    return batch.per_sample(chosen_n)


def _share(where: npt.NDArray[np.bool_]) -> float:
    """Return the share of True; 0 of nothing."""
    return float(where.mean()) if where.size else 0.0
