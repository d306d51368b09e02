"""Losses and weights against plain loops over tokens and samples."""

from __future__ import annotations

import math
import statistics
from dataclasses import replace

import numpy as np
import pytest
import torch

from roll_r3.algorithms.aggregation import loss_denominator, loss_weights
from roll_r3.algorithms.kl import kl_estimate
from roll_r3.algorithms.losses.base import TokenInputs
from roll_r3.algorithms.losses.policy_loss import policy_loss
from roll_r3.algorithms.stats import TokenStats
from roll_r3.batch.batch import Batch
from roll_r3.config.algorithm import AlgorithmConfig
from roll_r3.config.derived import algorithm_of
from roll_r3.config.pipeline import RLVRConfig


def config(**changes) -> AlgorithmConfig:
    return algorithm_of(RLVRConfig(exp_name="t", pretrain="x", actor_train={}, actor_infer={}, **changes))


def test_derived_settings_come_from_their_fields():
    assert config(pg_clip=0.3).clip_range == (0.3, 0.3)
    assert config(pg_clip_low=0.1, pg_clip_high=0.4).clip_range == (0.1, 0.4)
    assert config(response_length=7).loss_divisor == 7.0
    assert config(response_length=7, loss_scale_factor=2.5).loss_divisor == 2.5


def slow_loss(lp, ent, mask, adv, old, pg_weights, ref, c: AlgorithmConfig) -> list[float]:
    """Compute one token at a time, by the formulas in the papers."""
    low, high = c.clip_range
    out = []
    for i in range(len(lp)):
        if not mask[i]:
            out.append(0.0)
            continue
        r, a = math.exp(lp[i] - old[i]), adv[i]
        value = min(r * a, min(max(r, 1 - low), 1 + high) * a)
        if c.dual_clip_loss is not None and a < 0:
            value = max(value, c.dual_clip_loss * a)
        loss = -value * pg_weights[i]
        if c.use_kl_loss:
            d = lp[i] - ref[i]
            kl = {"k2": d * d / 2, "k3": math.exp(-d) - 1 + d}[c.kl_estimator]
            loss += c.kl_loss_coef * (r * kl if c.use_unbiased_kl else kl)
        out.append(loss - c.entropy_loss_coef * ent[i])
    return out


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"pg_clip_low": 0.1, "pg_clip_high": 0.4},
        {"dual_clip_loss": 1.5},
        {"use_kl_loss": True, "kl_loss_coef": 0.3, "use_unbiased_kl": True},
        {"use_kl_loss": True, "kl_loss_coef": 0.3, "kl_estimator": "k2"},
        {"use_kl_loss": True, "kl_loss_coef": 0.3, "entropy_loss_coef": 0.2},
    ],
)
def test_policy_loss_equals_the_loop(changes):
    c = config(**changes)
    g = torch.Generator().manual_seed(0)
    lp, old, weights, ref = (-torch.rand(4, 50, generator=g, dtype=torch.float64) * 2 for _ in range(4))
    adv = torch.randn(50, generator=g, dtype=torch.float64)
    ent = torch.rand(50, generator=g, dtype=torch.float64)
    mask = torch.rand(50, generator=g) > 0.3
    lp, old, weights, ref = lp[0], old[1], weights[2].abs(), ref[3]
    stats = TokenStats()
    x = TokenInputs(mask, adv, old, ref, pg_weights=weights, weights=mask / mask.sum())
    got = policy_loss(lp, ent, x, c, stats)
    want = slow_loss(*(x.tolist() for x in (lp, ent, mask, adv, old, weights, ref)), c)
    plain = policy_loss(lp, ent, replace(x, pg_weights=None), c, TokenStats())
    ones = policy_loss(lp, ent, replace(x, pg_weights=torch.ones_like(weights)), c, TokenStats())
    torch.testing.assert_close(plain, ones, atol=0, rtol=0)
    torch.testing.assert_close(got, torch.tensor(want, dtype=torch.float64), atol=1e-12, rtol=0)
    figures = stats.reduce()
    ratios = [math.exp(a - b) for a, b, m in zip(lp, old, mask, strict=True) if m]
    assert figures["actor/ratio_mean"] == pytest.approx(statistics.mean(ratios))
    assert figures["actor/ratio_max"] == pytest.approx(max(ratios))
    assert figures["actor/ratio_min"] == pytest.approx(min(ratios))


def test_masked_tokens_cannot_spoil_loss_or_gradient():
    lp = torch.tensor([-1.0, -500.0], requires_grad=True)
    mask = torch.tensor([True, False])
    x = TokenInputs(
        mask,
        torch.ones(2),
        torch.tensor([-1.0, 500.0]),
        torch.tensor([-1.0, 900.0]),
        weights=torch.tensor([1.0, 0.0]),
    )
    loss = policy_loss(lp, None, x, config(use_kl_loss=True), TokenStats()).sum()
    loss.backward()
    assert torch.isfinite(loss)
    assert lp.grad is not None
    assert lp.grad[1] == 0
    assert torch.isfinite(lp.grad[0])


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"pg_clip_low": 0.1, "pg_clip_high": 0.4},
        {"dual_clip_loss": 1.5},
    ],
)
def test_the_clipped_share_counts_tokens_that_have_no_gradient(changes):
    g = torch.Generator().manual_seed(1)
    n = 400
    old, mask = -torch.rand(n, generator=g) * 2, torch.rand(n, generator=g) > 0.3
    lp = (old + torch.randn(n, generator=g)).requires_grad_()
    with torch.no_grad():
        lp[:8] = old[:8] + torch.tensor([25.0, -25.0]).repeat(4)
    adv = torch.randn(n, generator=g) * (torch.rand(n, generator=g) > 0.2)
    stats = TokenStats()
    x = TokenInputs(mask, adv, old, weights=mask / mask.sum())
    (gradient,) = torch.autograd.grad(policy_loss(lp, None, x, config(**changes), stats).sum(), lp)
    figures = stats.reduce()
    learns = mask & (adv != 0)
    assert figures["actor/pg_clipfrac"] == pytest.approx(float((learns & (gradient == 0)).sum() / mask.sum()))
    assert 0.1 < figures["actor/pg_clipfrac"] < figures["actor/ppo_ratio_clipfrac"] - 0.1
    assert figures["actor/ppo_ratio_clipfrac"] == pytest.approx(
        figures["actor/ppo_ratio_high_clipfrac"] + figures["actor/ppo_ratio_low_clipfrac"]
    )


def batch_of(masks: list[list[bool]]) -> Batch:
    n = sum(map(len, masks))
    zeros = np.zeros(n, np.int64)
    return Batch(
        tuple(map(str, range(len(masks)))),
        np.array([len(m) for m in masks]),
        zeros,
        zeros,
        np.concatenate([np.array(m, bool) for m in masks]),
        np.zeros(n, np.float32),
    )


MODES = [
    {"loss_agg_mode": "token-mean"},
    {"loss_agg_mode": "seq-mean-token-mean"},
    {"loss_agg_mode": "seq-mean-token-sum"},
    {"loss_agg_mode": "seq-mean-token-sum-norm", "response_length": 40},
    {"loss_agg_mode": "seq-mean-token-sum-norm", "loss_scale_factor": 7.5},
]


def aggregated(samples: list[list[float]], c: RLVRConfig) -> float:
    """Aggregate the token losses of a step's samples; a sample without trained tokens does not count."""
    kept = [sample for sample in samples if sample]
    if c.loss_agg_mode == "token-mean":
        return sum(map(sum, kept)) / sum(map(len, kept))
    divisor = {
        "seq-mean-token-mean": None,
        "seq-mean-token-sum": 1,
        "seq-mean-token-sum-norm": c.loss_divisor,
    }[c.loss_agg_mode]
    return sum(sum(sample) / (divisor or len(sample)) for sample in kept) / len(kept)


@pytest.mark.parametrize("changes", MODES)
def test_aggregation_equals_its_name(changes):
    c = config(**changes)
    masks = [[False, True, True], [True], [False, False], [True, True, True, True]]
    losses = np.random.default_rng(0).normal(size=10).astype(np.float64)
    starts = [0, 3, 4, 6]
    want = aggregated([[losses[i + j] for j, x in enumerate(m) if x] for i, m in zip(starts, masks, strict=True)], c)
    whole = batch_of(masks)
    found = (loss_weights(whole, c) * losses).sum() / loss_denominator(whole, c.loss_agg_mode)
    assert found == pytest.approx(want, rel=1e-6)
    # and it does not matter how samples are cut up
    parts = [whole.select([0, 2]), whole.select([1, 3])]
    picked = [np.r_[losses[:3], losses[4:6]], np.r_[losses[3:4], losses[6:]]]
    total = sum((loss_weights(p, c) * x).sum() for p, x in zip(parts, picked, strict=True))
    assert total / sum(loss_denominator(p, c.loss_agg_mode) for p in parts) == pytest.approx(want, rel=1e-6)


def test_a_token_weighs_the_same_whatever_the_lengths_are():
    """The constant of Dr. GRPO is independent of the response's length and of dropped samples."""
    c = config(loss_agg_mode="seq-mean-token-sum-norm", loss_scale_factor=8.0)
    for masks in ([[True]], [[True] * 5, [True]], [[True] * 3, [False] * 2]):
        weights = loss_weights(batch_of(masks), c)
        assert set(weights.tolist()) <= {0.0, 0.125}


def test_kl_estimators_agree_with_the_exact_divergence_in_the_mean():
    g = torch.Generator().manual_seed(0)
    p = torch.distributions.Categorical(logits=torch.tensor([0.3, 0.1, -0.2]))
    q = torch.distributions.Categorical(logits=torch.tensor([0.0, 0.2, -0.1]))
    torch.manual_seed(g.initial_seed())
    x = p.sample((200_000,))
    exact = torch.distributions.kl_divergence(p, q).item()
    for k in ("k1", "k3"):
        assert kl_estimate(p.log_prob(x), q.log_prob(x), k)[0].mean().item() == pytest.approx(exact, rel=0.15)
    with pytest.raises(ValueError, match="k1, k2, k3 or abs, got 'k4'"):
        kl_estimate(torch.zeros(1), torch.zeros(1), "k4")


def test_stats_add_up_over_micro_batches():
    stats = TokenStats()
    for values, mask in (([1.0, 5.0], [True, True]), ([9.0, -3.0], [True, False])):
        v, m = torch.tensor(values), torch.tensor(mask)
        stats.add("mean", v, m)
        stats.add("max", v, m, "max")
        stats.add("min", v, m, "min")
    stats.add("nothing", torch.ones(1), torch.zeros(1, dtype=torch.bool))
    assert stats.reduce() == {"mean": 5.0, "max": 9.0, "min": 1.0}
    assert stats.reduce(lambda t, op: t.mul_(2) if op == "sum" else t)["mean"] == 5.0, (
        "sums and counts are reduced alike"
    )


def test_merged_stats_are_those_of_everything_together():
    """Statistics of a skipped optimizer step are not merged."""
    values = [torch.tensor(x) for x in ([1.0, 5.0], [2.0, -4.0], [3.0, torch.nan])]
    whole, merged, mask = TokenStats(), TokenStats(), torch.ones(2, dtype=torch.bool)
    for number, value in enumerate(values):
        part = TokenStats()
        for stats in (whole, part) if number < 2 else (part,):
            stats.add("mean", value, mask)
            stats.add("max", value, mask, "max")
            stats.add("min", value, mask, "min")
        if number < 2:
            merged.merge(part)
    assert merged.reduce() == whole.reduce() == {"mean": 1.0, "max": 5.0, "min": -4.0}


def test_a_sum_over_an_optimizer_step_is_its_mean_over_the_steps_that_were_made():
    """Micro-batches and ranks add up within a step; steps are averaged."""
    ranks = []
    for rank in range(2):
        whole = TokenStats()
        for step in range(3):
            part = TokenStats()
            for micro_batch in range(2):
                part.add_share("loss", torch.tensor(100.0 * step + 10.0 * rank + micro_batch))
            if step != 1:  # left out
                whole.merge(part)
        ranks.append(whole)
    sums = sum(ranks[r]._shares["loss"] for r in range(2))
    wanted = ((0 + 1 + 10 + 11) + (200 + 201 + 210 + 211)) / 2
    assert [r.reduce(lambda t, op: t.copy_(sums.expand_as(t)))["loss"] for r in ranks] == [wanted, wanted]
    alone = TokenStats()
    alone.add_share("loss", torch.tensor(3.0))
    assert alone.reduce() == {"loss": 3.0}
