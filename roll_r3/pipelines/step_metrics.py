"""Metrics of one step, under the names of `roll_r3.tracking.names`."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import torch

from roll_r3.algorithms.advantages import TokenAdvantages
from roll_r3.algorithms.kl import kl_estimate
from roll_r3.algorithms.mismatch import mismatch_metrics
from roll_r3.algorithms.signal import group_signal
from roll_r3.batch.batch import Batch
from roll_r3.batch.trajectory import Trajectory
from roll_r3.cluster.models import BatchLogProbs, BatchUpdate
from roll_r3.config.derived import gives_rollout_log_probs
from roll_r3.config.pipeline import RLVRConfig
from roll_r3.replay.expert_load import load_metrics

DOMAIN_FIGURES = (
    "critic/score/mean",
    "tokens/response_length/mean",
    "tokens/response_length/max",
    "tokens/truncated_ratio",
)
"""Metrics repeated for each section of `rewards`, after its name."""


@dataclass
class StepClock:
    """Seconds of each stage of a step."""

    started: float = field(default_factory=time.perf_counter)
    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Time the block."""
        start = time.perf_counter()
        yield
        self.seconds[f"time/step_{name}"] = time.perf_counter() - start

    def stop(self) -> dict[str, float]:
        """Return the seconds of all stages, and of the step as a whole."""
        return self.seconds | {"time/step_total": time.perf_counter() - self.started}


@dataclass(frozen=True)
class StepRecord:
    """Results of a step for its metrics."""

    step: int
    seconds: dict[str, float]
    trajectories: Sequence[Trajectory]
    groups: Sequence[str]
    """The group of each trajectory."""
    scores: npt.NDArray[np.float64]
    """Rewards, one per trajectory."""
    advantages: TokenAdvantages | None
    batch: Batch | None
    """With every field filled; fillers may follow the trajectories."""
    old: BatchLogProbs | None
    update: BatchUpdate | None
    """None in a step without a token to train on."""
    dropped: int
    failed_rewards: int
    undecided_rewards: int
    retries: int
    engine_restarts: int
    samples_seen: int
    domains: Sequence[str] = ()
    """Section of `rewards` of each trajectory."""


def step_metrics(config: RLVRConfig, r: StepRecord) -> dict[str, float]:
    """Return metric name -> value."""
    metrics = {
        **r.seconds,
        **_sample_metrics(r.trajectories, r.groups, r.scores),
        "rollout/dropped_samples": r.dropped,
        "rollout/retries": r.retries,
        "rollout/engine_restarts": r.engine_restarts,
        "reward/failed": r.failed_rewards,
        "reward/undecided": r.undecided_rewards,
        "mask/final_mask_sum_eq_0": float(r.update is None),
        "system/global_step": r.step,
        "system/samples": r.samples_seen,
        "system/tps": sum(t.num_tokens for t in r.trajectories) / r.seconds["time/step_total"],
    }
    if len(config.rewards) > 1:
        metrics |= _domain_metrics(r)
    if r.batch is not None and r.batch.old_log_probs_N is not None:
        metrics |= _mismatch(config, r.trajectories, r.batch)
    return metrics if r.update is None else metrics | _update_metrics(config, r, r.update)


def _sample_metrics(
    trajectories: Sequence[Trajectory], groups: Sequence[str], scores: npt.NDArray[np.float64]
) -> dict[str, float]:
    """Return figures of samples; none without a sample."""
    if not trajectories:
        return {}
    return {
        **_spread("critic/score", scores),
        **group_signal(scores, groups),
        **_spread("tokens/prompt_length", np.array([len(t.prompt_ids) for t in trajectories])),
        **_spread("tokens/response_length", np.array([t.num_sampled for t in trajectories])),
        "tokens/truncated_ratio": float(np.mean([t.finish_reason == "length" for t in trajectories])),
    }


def _domain_metrics(r: StepRecord) -> dict[str, float]:
    """Return figures of each section's samples, under the section's name."""
    metrics: dict[str, float] = {}
    for domain in sorted(set(r.domains)):
        own = [i for i, name in enumerate(r.domains) if name == domain]
        groups = [r.groups[i] for i in own]
        figures = _sample_metrics([r.trajectories[i] for i in own], groups, r.scores[own])
        metrics |= {f"{domain}/{name}": figures[name] for name in DOMAIN_FIGURES}
        metrics[f"{domain}/rollout/groups"] = len(set(groups))
    return metrics


def _update_metrics(config: RLVRConfig, r: StepRecord, update: BatchUpdate) -> dict[str, float]:
    """Return figures of a step's update."""
    assert r.batch is not None and r.old is not None and r.advantages is not None
    batch, mask, seconds = r.batch, r.batch.loss_mask_N, r.seconds["time/step_total"]
    assert batch.old_log_probs_N is not None and batch.advantages_N is not None
    metrics = {
        **_spread("critic/rewards", r.advantages.rewards_n),
        **_spread("critic/advantages", batch.advantages_N[mask]),
        **_mean("critic/old_log_prob/mean", batch.old_log_probs_N[mask]),
        **update.metrics,
    }
    if r.old.entropy_N is not None:
        metrics |= _mean("critic/entropy/mean", r.old.entropy_N[mask])
    if batch.ref_log_probs_N is not None:
        metrics |= _mean("critic/ref_log_prob/mean", batch.ref_log_probs_N[mask])
        old, ref = (torch.from_numpy(x[mask]).double() for x in (batch.old_log_probs_N, batch.ref_log_probs_N))
        kl, clamped = kl_estimate(old, ref, "k3")
        metrics |= _mean("critic/kl", kl.numpy()) | _mean("critic/kl_clamped", clamped.numpy())
    if r.advantages.penalty_n is not None and r.advantages.penalty_clamped is not None:
        metrics["critic/kl_penalty"] = float(r.advantages.penalty_n.mean())
        metrics["critic/kl_penalty_clamped"] = r.advantages.penalty_clamped
    return metrics | _replay_metrics(r.trajectories, update, r.old, seconds)


def _mismatch(config: RLVRConfig, trajectories: Sequence[Trajectory], batch: Batch) -> dict[str, float]:
    """Compare trainer and rollout on sampled tokens, also on those that masks and filters took out of training."""
    if config.rollout_correction.bypass:
        return {}
    sampled = np.concatenate([t.sampled_T[1:] for t in trajectories])
    sampled_N = np.pad(sampled, (0, len(batch.loss_mask_N) - len(sampled)))  # fillers
    return mismatch_metrics(batch, sampled_N) if gives_rollout_log_probs(config) else _truncated_mass(batch, sampled_N)


def _truncated_mass(batch: Batch, sampled_N: npt.NDArray[np.bool_]) -> dict[str, float]:
    """Return the mean of whole / truncated probability over tokens of the truncated distribution.

    Its expectation is the probability, in the whole distribution, of the tokens kept by the engine.
    """
    assert batch.old_log_probs_N is not None
    gaps_N = batch.old_log_probs_N.astype(np.float64) - batch.rollout_log_probs_N
    return _mean("sampling_mask/mass", np.exp(gaps_N[sampled_N]))


def _replay_metrics(
    trajectories: Sequence[Trajectory], made: BatchUpdate, old: BatchLogProbs, seconds: float
) -> dict[str, float]:
    """Return coverage and padding of the update, and agreement and load under the sampling weights."""
    update, load = made.replay, old.load or made.load
    loads = load_metrics(load) if load else {}
    if update is None:
        return loads
    metrics = {
        "router_replay/coverage": update.trainable_replayed / max(update.trainable, 1),
        "router_replay/missing_rows": update.missing,
        "router_replay/padded_rows": update.padded,
        "router_replay/time_share": (old.seconds_in_routes + made.seconds_in_routes) / seconds,
    }
    for counts in (update, old.replay):  # R2's own recording pass has nothing to compare with
        if counts is not None and counts.compared:
            metrics["router_replay/agreement_native"] = counts.agreed / counts.compared
    if update.audited:
        metrics["router_replay/audit_equal"] = update.audit_equal / update.audited
        metrics["router_replay/audit_entries"] = update.audited
    routes = [t.routes for t in trajectories if t.routes is not None]
    if routes:
        metrics["router_replay/bytes_per_token"] = sum(x.nbytes for x in routes) / sum(x.num_rows for x in routes)
    return metrics | loads


def _mean(name: str, values: npt.NDArray[np.generic]) -> dict[str, float]:
    """Return the mean by name; nothing of no values, as in a step without a token left to train."""
    return {name: float(values.astype(np.float64).mean())} if len(values) else {}


def _spread(prefix: str, values: npt.NDArray[np.generic]) -> dict[str, float]:
    """Return mean, max and min."""
    if not len(values):
        return {}
    return {f"{prefix}/{name}": float(getattr(np, name)(values)) for name in ("mean", "max", "min")}
