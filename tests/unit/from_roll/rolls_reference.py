"""ROLL's formulas on padded tensors, read from ROLL's own keys with ROLL's defaults.

Written from the steps of ROLL's `rlvr_pipeline`, `actor_worker`, `actor_pg_worker` and `train_infer_corrections`, in
fp64. Shape legend: n samples in groups of equal size, T tokens of the longest response.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

GROUP, GROUPS, LONGEST = 4, 8, 7
DOMAINS = ("math_rule", "other")


@dataclass(frozen=True)
class Samples:
    """Samples of a step: n in groups of equal size, padded to the longest response. fp64."""

    scores: Tensor
    domains: list[str]
    lengths: Tensor
    live: Tensor
    old: Tensor
    rollout: Tensor
    ref: Tensor

    @property
    def mask(self) -> Tensor:
        """bool [n, T]"""
        return torch.arange(LONGEST)[None] < self.lengths[:, None]


def samples(seed: int) -> Samples:
    g = torch.Generator().manual_seed(seed)
    n = GROUP * GROUPS

    def near(values: Tensor, spread: float) -> Tensor:
        noise = torch.randn(values.shape, generator=g, dtype=torch.float64)
        return (values + spread * noise).clamp(max=-0.01).float().double()  # a batch holds fp32

    rollout = (-2 * torch.rand(n, LONGEST, generator=g, dtype=torch.float64) - 0.05).float().double()
    old = near(rollout, 0.3)
    right = (0.2 + 0.6 * torch.rand(GROUPS, generator=g)).repeat_interleave(GROUP)
    domains = [DOMAINS[group % 3 > 1] for group in range(GROUPS) for _ in range(GROUP)]
    lengths = torch.randint(1, LONGEST + 1, (n,), generator=g)
    scores = (torch.rand(n, generator=g) < right).double()
    return Samples(scores, domains, lengths, near(old, 0.4), old, rollout, near(old, 0.5))


def rolls_kl(a: Tensor, b: Tensor, name: str) -> Tensor:
    d = a - b
    return {"kl": d, "abs": d.abs(), "mse": d * d / 2}[name]


def clamp(values: Tensor, limit: float | None) -> Tensor:
    return values.clamp(-limit, limit) if limit else values


def rolls_masks(roll: dict[str, Any], s: Samples) -> Tensor:
    """Return the trained tokens, [n, T]."""
    kept = torch.ones(len(s.scores), dtype=torch.bool)
    if roll.get("max_len_mask"):
        kept &= s.lengths != LONGEST
    if roll.get("difficulty_mask"):
        means = s.scores.reshape(-1, GROUP).mean(1).repeat_interleave(GROUP)
        low, high = roll.get("difficulty_low_threshold", 0.0), roll.get("difficulty_high_threshold", 1.0)
        kept &= (means > low) & (means < high)
    return s.mask & kept[:, None]


def rolls_advantages(roll: dict[str, Any], s: Samples, trained: Tensor) -> Tensor:
    """Return advantages, [n, T], domain by domain."""
    found = torch.zeros(s.mask.shape, dtype=torch.float64)
    for domain in DOMAINS:
        rows = torch.tensor([d == domain for d in s.domains])
        found[rows] = one_domain(roll, s, trained, rows)
    return found


def one_domain(roll: dict[str, Any], s: Samples, trained: Tensor, rows: Tensor) -> Tensor:
    kinds = [roll.get(f"norm_{which}_type") for which in ("mean", "std")]
    if roll["adv_estimator"] == "grpo":
        kinds = ["group", "group"]
    scores = s.scores[rows]
    groups = scores.reshape(-1, GROUP)
    means = {None: 0.0, "batch": scores.mean(), "group": groups.mean(1).repeat_interleave(GROUP)}
    rewards = scores - means[kinds[0]]
    if kinds[1] is not None:
        deviations = {"batch": scores.std(), "group": groups.std(1).repeat_interleave(GROUP)}
        rewards = rewards / (deviations[kinds[1]] + 1e-6)
    rewards = clamp(rewards, roll.get("reward_clip"))
    token_rewards = torch.zeros(s.mask[rows].shape, dtype=torch.float64)
    token_rewards[torch.arange(len(scores)), s.lengths[rows] - 1] = rewards
    if roll.get("add_token_level_kl"):
        kl = rolls_kl(s.old[rows], s.ref[rows], roll.get("kl_penalty", "kl")) * s.mask[rows]
        token_rewards = token_rewards - roll.get("init_kl_coef", 0.2) * kl
    mask = trained[rows]
    token_rewards = clamp(token_rewards, roll.get("reward_clip")) * mask
    advantages = token_rewards.flip(1).cumsum(1).flip(1)
    if roll.get("whiten_advantages"):
        values = advantages[mask]
        if len(values) > 1:
            advantages = (advantages - values.mean()) / (values.var() + 1e-8).sqrt()
    return clamp(advantages * mask, roll.get("advantage_clip"))


def over_response(values: Tensor, mask: Tensor, level: str) -> Tensor:
    """Return the value of each token, or the sum or mean over its response; a segment is a whole response."""
    sums = (values * mask).sum(1, keepdim=True)
    return {"token": values, "sequence": sums}.get(level, sums / mask.sum(1, keepdim=True)).expand_as(values)


def rolls_corrections(roll: dict[str, Any], s: Samples) -> tuple[Tensor, Tensor]:
    """Return (weights of the policy gradient, tokens kept by the filters), each [n, T]."""
    log_ratio, differences = s.old - s.rollout, s.old.exp() - s.rollout.exp()
    weights, kept = torch.ones_like(s.old), torch.ones_like(s.mask)
    section = roll.get("train_infer_correction", {})
    weight = dict(section.get("is_weight", {}))
    if roll.get("use_rollout_importance_sampling_ratio"):
        weight = {"enabled": True}
    if weight.get("enabled"):
        weights = over_response(log_ratio, s.mask, weight.get("weight_type", "token")).exp()
        bound = weight.get("upper_bound", 1.2)
        weights = weights if bound is None else weights.clamp(max=bound)
    for item in section.get("filters", []):
        level = item.get("agg_type", "token")
        if item.get("ratio_enabled", True):
            ratio = over_response(log_ratio, s.mask, level).exp()
            kept &= (ratio >= item.get("ratio_low", 0.8)) & (ratio <= item.get("ratio_high", 1.2))
        if item.get("diff_enabled", False):
            difference = over_response(differences, s.mask, level)
            kept &= (difference >= item.get("diff_low", -0.2)) & (difference <= item.get("diff_high", 0.2))
    if roll.get("train_infer_diff_mask"):
        kept &= differences.abs() <= 0.2
    if roll.get("train_infer_ratio_seq_mask"):
        ratio = over_response(log_ratio, s.mask, "geometric").exp()
        kept &= (ratio >= 0.8) & (ratio <= 1.2)
    return weights, kept


def rolls_gradient_term(roll: dict[str, Any], s: Samples, live: Tensor, a: Tensor, trained: Tensor) -> Tensor:
    """Return the policy-gradient loss of each token, [n, T]."""
    train = roll["actor_train"]
    variant = train.get("pg_variant") if "worker_cls" in train else "ppo"
    log_ratio = live - s.old
    if roll.get("importance_sampling") == "seq":
        counts = trained.sum(1, keepdim=True).clamp(min=1)
        log_ratio = ((log_ratio * trained).sum(1, keepdim=True) / counts).expand_as(log_ratio)
    r = log_ratio.exp()
    if variant == "ppo":
        clip = roll.get("pg_clip", 0.2)
        low, high = clip, clip
        if roll.get("use_pg_clip_range"):
            low, high = roll.get("pg_clip_low", 0.2), roll.get("pg_clip_high", 0.2)
        loss = -torch.minimum(r * a, r.clamp(1 - low, 1 + high) * a)
        if roll.get("dual_clip_loss"):
            loss = torch.where(a < 0, torch.minimum(loss, -(1 + 2 * clip) * a), loss)
        return loss
    r = r.detach()
    right = (s.scores > 0)[:, None]
    weights = {
        "vanilla": torch.ones_like(r),
        "tis": r.clamp(0.0, 1.0),
        "topr": torch.where(
            right,
            torch.ones_like(r) * train.get("topr_positive_weight", 1.0),
            r.clamp(max=1.0) * train.get("topr_negative_weight", 1.0),
        ),
        "cispo": r.clamp(0.9, 1.1),
        "kimi15": torch.ones_like(r),
    }[variant]
    extra = 0.1 / 2 * (live - s.old) ** 2 if variant == "kimi15" else 0.0
    return -weights * a * live + extra


def rolls_loss(roll: dict[str, Any], s: Samples, live: Tensor) -> tuple[Tensor, Tensor]:
    """Return (loss of the optimizer step, advantages [n, T])."""
    trained = rolls_masks(roll, s)
    advantages = rolls_advantages(roll, s, trained)
    weights, kept = rolls_corrections(roll, s)
    trained = trained & kept
    loss = aggregated(roll, rolls_gradient_term(roll, s, live, advantages, trained) * weights, trained)
    if roll.get("use_kl_loss"):
        d = s.ref - live
        kl = (d.exp() - d - 1).clamp(-10, 10)
        loss = loss + roll["kl_loss_coef"] * aggregated(roll, kl, trained)
    return loss, advantages * trained


def aggregated(roll: dict[str, Any], values: Tensor, mask: Tensor) -> Tensor:
    mode = roll.get("loss_agg_mode", "seq-mean-token-mean")
    values = values * mask
    if mode == "token-mean":
        return values.sum() / mask.sum()
    sums, counts = values.sum(1), mask.sum(1)
    if mode == "seq-mean-token-mean":
        sums = sums / counts.clamp(min=1)
    return sums.sum() / (counts > 0).sum()
