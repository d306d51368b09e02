"""Every policy-gradient loss: values and gradients against scalar loops, exact means over enumerable policies."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any, get_args, get_type_hints

import numpy as np
import pytest
import torch
from torch import Tensor

from roll_r3.algorithms.entropy_quantile import weigh_by_entropy
from roll_r3.algorithms.losses.base import TokenInputs
from roll_r3.algorithms.losses.policy_loss import policy_loss
from roll_r3.algorithms.losses.sample_sums import SampleSums
from roll_r3.algorithms.losses.variants import PG_LOSSES
from roll_r3.algorithms.stats import TokenStats
from roll_r3.batch.batch import Batch
from roll_r3.batch.micro_batch import MicroBatch
from roll_r3.batch.token_map import Layout, build_token_map
from roll_r3.config.algorithm import AlgorithmConfig
from roll_r3.config.derived import algorithm_of
from roll_r3.config.pipeline import RLVRConfig

CPU = torch.device("cpu")
LENGTHS = (3, 1, 7, 2, 5)
N = sum(LENGTHS)
SEQ = {"importance_sampling": "seq", "loss_agg_mode": "seq-mean-token-mean"}
VARIANTS: list[dict[str, Any]] = [
    {},
    {"pg_clip_low": 0.1, "pg_clip_high": 0.4, "dual_clip_loss": 1.5},
    {"pg_variant": "vanilla"},
    {"pg_variant": "tis"},
    {"pg_variant": "tis", "pg_args": {"tis_lower_bound": 0.5, "tis_upper_bound": 1.5}},
    {"pg_variant": "topr"},
    {"pg_variant": "topr", "pg_args": {"topr_positive_weight": 2.0, "topr_negative_weight": 0.5}},
    {"pg_variant": "cispo", "pg_clip_low": 0.1, "pg_clip_high": 0.3},
    {"pg_variant": "cispo", "pg_clip_low": 1.0, "pg_clip_high": 0.3},
    {"pg_variant": "cispo", "pg_args": {"cispo_use_unified_mask": True}},
    {"pg_variant": "kimi15", "pg_args": {"kimi15_tau": 0.3}},
    {"pg_variant": "dppo_tv", "pg_clip_low": 0.1, "pg_clip_high": 0.2, "pg_args": {"dppo_max_ratio": 1.4}},
    {**SEQ, "pg_clip": 0.05},
    {**SEQ, "pg_clip": 0.05, "dual_clip_loss": 1.1},
    {**SEQ, "pg_variant": "tis"},
    {**SEQ, "pg_variant": "topr"},
    {**SEQ, "pg_variant": "cispo", "pg_clip": 0.05},
]


def config(**changes: Any) -> AlgorithmConfig:
    return algorithm_of(RLVRConfig(exp_name="t", pretrain="x", actor_train={}, actor_infer={}, **changes))


def batch_of(mask_N: np.ndarray, lengths: tuple[int, ...] = LENGTHS) -> Batch:
    zeros = np.zeros(len(mask_N), np.int64)
    return Batch(
        tuple(map(str, range(len(lengths)))), np.array(lengths), zeros, zeros, mask_N, np.zeros(len(mask_N), np.float32)
    )


def sums_of(batch: Batch, layout: Layout | None = None) -> SampleSums:
    """Return the sums of a micro-batch; by default in one packed row without padding, so the slots are the inputs."""
    tokens = build_token_map(batch.lengths_n, layout or Layout(packed=True))
    return SampleSums(MicroBatch(batch, np.arange(batch.num_samples), tokens), CPU, lambda values: None)


def tokens(seed: int = 0) -> dict[str, Tensor]:
    """Return random tokens of five samples, one of them untrained: fp64 [1, N]."""
    g = torch.Generator().manual_seed(seed)
    sample = torch.repeat_interleave(torch.arange(len(LENGTHS)), torch.tensor(LENGTHS))
    old = -torch.rand(N, generator=g, dtype=torch.float64) * 2 - 0.05
    return {
        "log_probs": (old + 0.8 * torch.randn(N, generator=g, dtype=torch.float64)).clamp(max=-0.01)[None],
        "old": old[None],
        "advantages": torch.randn(N, generator=g, dtype=torch.float64)[None],
        "scores": torch.tensor([1.0, 0.0, -0.5, 0.0, 2.0], dtype=torch.float64)[sample][None],
        "mask": ((torch.rand(N, generator=g) > 0.2) & (sample != 3))[None],
        "pg_weights": torch.rand(N, generator=g, dtype=torch.float64)[None] * 2,
    }


def inputs(t: dict[str, Tensor], **changes: Any) -> TokenInputs:
    made = TokenInputs(
        t["mask"],
        t["advantages"],
        t["old"],
        weights=t["mask"].double(),
        scores=t["scores"],
        sums=sums_of(batch_of(t["mask"][0].numpy())),
    )
    return replace(made, **changes)


def gradient_and_loss(
    t: dict[str, Tensor], c: AlgorithmConfig, **changes: Any
) -> tuple[Tensor, Tensor, dict[str, float]]:
    """Return (gradient of the sum by log-probabilities, loss of each token, figures)."""
    live, stats = t["log_probs"].detach().requires_grad_(), TokenStats()
    loss = policy_loss(live, None, inputs(t, **changes), c, stats)
    return torch.autograd.grad(loss.sum(), live)[0], loss.detach(), stats.reduce()


def slow(lp: float, old: float, r: float, a: float, score: float, c: AlgorithmConfig) -> tuple[float, float, bool]:
    """Return (loss, its derivative by the log-probability, truncated or cut) of one token, from the papers.

    Args:
        r: ratio of the token or of its sample; its derivative by the log-probability is r itself.
    """
    low, high = c.clip_range
    args = c.pg_args
    if c.pg_variant == "ppo":
        outside = (a > 0 and r > 1 + high) or (a < 0 and r < 1 - low)
        value, slope = (min(max(r, 1 - low), 1 + high) * a, 0.0) if outside else (r * a, r * a)
        if c.dual_clip_loss is not None and a < 0 and value < c.dual_clip_loss * a:
            return -c.dual_clip_loss * a, 0.0, True
        return -value, -slope, outside
    if c.pg_variant == "vanilla":
        return -a * lp, -a, False
    if c.pg_variant == "kimi15":
        return -a * lp + args.kimi15_tau / 2 * (lp - old) ** 2, -a + args.kimi15_tau * (lp - old), False
    if c.pg_variant == "tis":
        weight = min(max(r, args.tis_lower_bound), args.tis_upper_bound)
        return -weight * a * lp, -weight * a, weight != r
    if c.pg_variant == "topr":
        cut = score <= 0 and r > 1
        weight = args.topr_positive_weight if score > 0 else args.topr_negative_weight * min(r, 1)
        return -weight * a * lp, -weight * a, cut
    if c.pg_variant == "cispo":
        weight = min(max(r, 1 - low), 1 + high)
        if not args.cispo_use_unified_mask:
            return -weight * a * lp, -weight * a, weight != r
        cut = (a > 0 and r > 1 + high) or (a < 0 and r < 1 - low)
        return (0.0, 0.0, True) if cut else (-weight * a * lp, -weight * a, False)
    assert c.pg_variant == "dppo_tv"
    moved = math.exp(lp) - math.exp(old)
    if (a > 0 and moved > high) or (a < 0 and moved < -low):
        return 0.0, 0.0, True
    weight = min(r, args.dppo_max_ratio)
    return -weight * a * lp, -weight * a, False


def slow_ratios(t: dict[str, Tensor], c: AlgorithmConfig) -> list[float]:
    gaps, mask = (t["log_probs"] - t["old"])[0].tolist(), t["mask"][0].tolist()
    if c.importance_sampling == "token":
        return [math.exp(gap) for gap in gaps]
    found, start = [], 0
    for length in LENGTHS:
        kept = [gaps[i] for i in range(start, start + length) if mask[i]]
        found += [math.exp(sum(kept) / max(len(kept), 1))] * length
        start += length
    return found


def test_the_registry_has_every_variant() -> None:
    assert list(PG_LOSSES) == list(get_args(get_type_hints(AlgorithmConfig)["pg_variant"]))


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("changes", VARIANTS, ids=str)
def test_values_and_gradients_equal_a_loop(changes: dict[str, Any], weighted: bool) -> None:
    t, c = tokens(), config(**changes)
    gradient, loss, figures = gradient_and_loss(t, c, pg_weights=t["pg_weights"] if weighted else None)
    rows = zip(*(t[name][0].tolist() for name in ("log_probs", "old", "advantages", "scores", "mask")), strict=True)
    ratios, factors = slow_ratios(t, c), t["pg_weights"][0].tolist() if weighted else [1.0] * N
    cuts = []
    for i, (lp, old, a, score, trained) in enumerate(rows):
        value, slope, cut = slow(lp, old, ratios[i], a, score, c) if trained else (0.0, 0.0, False)
        assert loss[0, i].item() == pytest.approx(factors[i] * value, abs=1e-13)
        assert gradient[0, i].item() == pytest.approx(factors[i] * slope, abs=1e-13)
        cuts += [cut] if trained else []
    assert figures["actor/pg_clipfrac"] == pytest.approx(sum(cuts) / len(cuts))
    assert any(cuts) or c.pg_variant in ("vanilla", "kimi15"), "some tokens are cut, so that a cut is tested"
    assert figures["actor/ratio_max"] == pytest.approx(
        max(r for r, trained in zip(ratios, t["mask"][0].tolist(), strict=True) if trained)
    )


def test_weights_of_the_batch_do_not_reach_kl_and_entropy() -> None:
    t, c = tokens(), config(use_kl_loss=True, kl_loss_coef=0.3, entropy_loss_coef=0.2)
    entropy = torch.rand(1, N, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    reference = t["old"] - 0.3
    x = inputs(t, ref_log_probs=reference)

    def loss(**changes: Any) -> Tensor:
        return policy_loss(t["log_probs"], entropy, replace(x, **changes), c, TokenStats())

    none = loss(pg_weights=torch.zeros_like(t["old"]))
    alone = loss(advantages=torch.zeros_like(t["old"]))
    torch.testing.assert_close(none, alone, atol=1e-15, rtol=0)
    assert none.abs().max() > 0.01


@pytest.mark.parametrize(
    "changes", [{"pg_variant": "cispo"}, {"pg_variant": "tis"}, {"pg_variant": "dppo_tv"}, SEQ, {}]
)
def test_on_policy_the_gradient_is_that_of_reinforce(changes: dict[str, Any]) -> None:
    t = tokens()
    t["log_probs"] = t["old"]
    found, _, figures = gradient_and_loss(t, config(**changes))
    wanted, _, _ = gradient_and_loss(t, config(pg_variant="vanilla"))
    torch.testing.assert_close(found, wanted, atol=1e-15, rtol=0)
    assert (figures["actor/ratio_min"], figures["actor/ratio_max"], figures["actor/pg_clipfrac"]) == (1, 1, 0)


@pytest.mark.parametrize(
    ("advantage", "live", "learns"),
    [
        (1.0, 0.75, False),  # up by more than 0.2, and pushed further up
        (1.0, 0.25, True),  # down, but pushed back
        (-1.0, 0.75, True),
        (-1.0, 0.25, False),
        (1.0, 0.65, True),  # within the region
        (-1.0, 0.35, True),
    ],
)
def test_dppo_leaves_out_two_of_the_four_corners(advantage: float, live: float, learns: bool) -> None:
    log_probs = torch.tensor([live], dtype=torch.float64).log().requires_grad_()
    x = TokenInputs(
        torch.tensor([True]),
        torch.tensor([advantage], dtype=torch.float64),
        torch.tensor([0.5], dtype=torch.float64).log(),
        weights=torch.ones(1),
    )
    loss = policy_loss(log_probs, None, x, config(pg_variant="dppo_tv", pg_clip=0.2), TokenStats()).sum()
    (gradient,) = torch.autograd.grad(loss, log_probs)
    assert gradient.item() == pytest.approx(-advantage * live / 0.5 if learns else 0.0)


def test_dppo_leaves_rare_tokens_free_which_ppo_clips() -> None:
    t = {
        "log_probs": torch.tensor([[0.003]], dtype=torch.float64).log(),
        "old": torch.tensor([[0.001]], dtype=torch.float64).log(),
        "advantages": torch.ones(1, 1, dtype=torch.float64),
        "scores": torch.ones(1, 1),
        "mask": torch.ones(1, 1, dtype=torch.bool),
    }
    for changes, slope in (({"pg_variant": "dppo_tv"}, -3.0), ({}, 0.0)):
        gradient, _, _ = gradient_and_loss(t, config(**changes), sums=None)
        assert gradient.item() == pytest.approx(slope)


# Ratios of samples


def direct_gspo(t: dict[str, Tensor], c: AlgorithmConfig) -> Tensor:
    """Return the gradient of -min(s A, clip(s) A) / n over samples, with s differentiated as a whole."""
    live = t["log_probs"].detach().requires_grad_()
    low, high = c.clip_range
    terms, start = [], 0
    for length in LENGTHS:
        rows = slice(start, start + length)
        start += length
        mask, a = t["mask"][0, rows], t["advantages"][0, rows]
        if mask.any():
            s = (live - t["old"])[0, rows][mask].mean().exp()
            terms.append(-torch.minimum(s * a[0], s.clamp(1 - low, 1 + high) * a[0]))
    return torch.autograd.grad(torch.stack(terms).mean(), live)[0]


@pytest.mark.parametrize("clip", [0.05, 0.3])
def test_the_gradient_of_gspo_is_that_of_the_direct_form(clip: float) -> None:
    """The advantage is constant over a sample here, as without a KL penalty."""
    t, c = tokens(), config(**SEQ, pg_clip=clip)
    sample = torch.repeat_interleave(torch.arange(len(LENGTHS)), torch.tensor(LENGTHS))
    t["advantages"] = torch.tensor([0.7, -1.2, 1.1, 0.3, -0.4], dtype=torch.float64)[sample][None]
    batch = batch_of(t["mask"][0].numpy())
    tokens_n = batch.sum_per_sample(batch.loss_mask_N)
    weights = torch.from_numpy(batch.per_sample(1 / np.maximum(tokens_n, 1)) / (tokens_n > 0).sum())[None]
    live, stats = t["log_probs"].detach().requires_grad_(), TokenStats()
    loss = (policy_loss(live, None, inputs(t), c, stats) * weights).sum()
    (found,) = torch.autograd.grad(loss, live)
    torch.testing.assert_close(found, direct_gspo(t, c), atol=1e-14, rtol=0)
    assert 0 < stats.reduce()["actor/pg_clipfrac"] < 1


def test_a_sample_far_away_has_a_bounded_ratio_without_gradient() -> None:
    t = tokens()
    t["log_probs"] = t["old"] - 25.0
    gradient, loss, _ = gradient_and_loss(t, config(**SEQ, pg_variant="tis"))
    assert torch.isfinite(loss).all()
    t["advantages"] = t["advantages"].abs()
    gradient, _, figures = gradient_and_loss(t, config(**SEQ))
    assert figures["actor/ratio_max"] == pytest.approx(math.exp(-20))
    assert gradient.abs().max() == 0


LAYOUTS = [
    Layout(),
    Layout(packed=True, multiple=4),
    Layout(cp_size=2),
    Layout(packed=True, cp_size=2, multiple=2),
    Layout(packed=True, cp_size=3),
]


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_sums_of_samples_add_up_over_the_ranks_that_share_them(layout: Layout) -> None:
    """Play all context-parallel ranks in one process: each adds the other ranks' parts."""
    mask_N = tokens()["mask"][0].numpy()
    batch = batch_of(mask_N)
    values_N = np.random.default_rng(0).normal(size=N)
    parts: list[Tensor] = []
    ranks = [sums_of(batch, replace(layout, cp_rank=rank)) for rank in range(layout.cp_size)]
    views = [
        (
            torch.from_numpy(rank.micro.tokens.gather(values_N, np.nan)),
            torch.from_numpy(rank.micro.tokens.gather(mask_N, False)),
        )
        for rank in ranks
    ]
    for rank, (values, mask) in zip(ranks, views, strict=True):
        replace(rank, add_up=lambda part: parts.append(part.clone())).means(values, mask)
    total = torch.stack(parts).sum(0)
    wanted_n = batch.sum_per_sample(np.where(mask_N, values_N, 0)) / np.maximum(batch.sum_per_sample(mask_N), 1)
    for rank, (values, mask) in zip(ranks, views, strict=True):
        found = replace(rank, add_up=lambda part: part.copy_(total)).means(values, mask)
        wanted = torch.from_numpy(rank.micro.tokens.gather(batch.per_sample(wanted_n), 0.0))
        torch.testing.assert_close(found, wanted, atol=1e-15, rtol=0)


# Exact means over an enumerable policy


SIZE = 4


def responses(theta: Tensor) -> Tensor:
    """Return the log-probabilities of both tokens of every response of two: [SIZE^2, 2], from [1 + SIZE, SIZE]."""
    table = theta.log_softmax(-1)
    first, second = (x.flatten() for x in torch.meshgrid(torch.arange(SIZE), torch.arange(SIZE), indexing="ij"))
    return torch.stack([table[0, first], table[1 + first, second]], dim=1)


def mean_gradient(theta: Tensor, old: Tensor, advantages: Tensor, c: AlgorithmConfig) -> Tensor:
    """Return the expected gradient of the loss over all responses of the old policy."""
    theta = theta.detach().requires_grad_()
    live, sampled = responses(theta), responses(old).detach()
    n = len(live)
    mask = torch.ones(1, 2 * n, dtype=torch.bool)
    x = TokenInputs(
        mask,
        advantages.reshape(1, -1),
        sampled.reshape(1, -1),
        weights=sampled.sum(1).exp().repeat_interleave(2)[None],
        scores=torch.ones_like(mask, dtype=torch.float64),
        sums=sums_of(batch_of(mask[0].numpy(), (2,) * n)),
    )
    loss = policy_loss(live.reshape(1, -1), None, x, c, TokenStats())
    return torch.autograd.grad((loss * x.weights).sum(), theta)[0]


def exact(theta: Tensor, old: Tensor, advantages: Tensor, value: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """Return the gradient of -sum(old's probability x value(live, old) x advantage) over all responses and tokens."""
    theta = theta.detach().requires_grad_()
    live, sampled = responses(theta), responses(old).detach()
    objective = (sampled.sum(1, keepdim=True).exp() * value(live, sampled) * advantages).sum()
    return -torch.autograd.grad(objective, theta)[0]


@pytest.mark.parametrize("distance", [0.0, 0.3, 1.0])
@pytest.mark.parametrize(
    "changes",
    [
        {"pg_clip_low": 0.999, "pg_clip_high": 1e9},
        {"pg_variant": "cispo", "pg_clip_low": 1.0, "pg_clip_high": 1e9},
        {"pg_variant": "tis", "pg_args": {"tis_upper_bound": 1e9}},
        {"pg_variant": "dppo_tv", "pg_clip": 1.0, "pg_args": {"dppo_max_ratio": 1e9}},
    ],
    ids=str,
)
def test_without_clips_the_ratio_makes_the_mean_gradient_that_of_the_token_objective(
    changes: dict[str, Any], distance: float
) -> None:
    """The objective is E_old[sum of ratio x advantage]: exact for each token, given tokens before it from old."""
    g = torch.Generator().manual_seed(5)
    theta = torch.randn(1 + SIZE, SIZE, generator=g, dtype=torch.float64)
    old = theta + distance * torch.randn(1 + SIZE, SIZE, generator=g, dtype=torch.float64)
    advantages = torch.randn(SIZE * SIZE, 2, generator=g, dtype=torch.float64)
    found = mean_gradient(theta, old, advantages, config(**changes))
    wanted = exact(theta, old, advantages, lambda live, sampled: (live - sampled).exp())
    torch.testing.assert_close(found, wanted, atol=1e-14, rtol=0)
    biased = mean_gradient(theta, old, advantages, config(pg_variant="vanilla"))
    assert (biased - wanted).norm() >= 0.1 * distance * wanted.norm(), "so that a missing ratio is told apart"


def test_the_last_token_learns_the_true_objective_off_policy() -> None:
    """With an unchanged first token, the mean is the gradient of the reward under the live policy."""
    g = torch.Generator().manual_seed(6)
    theta = torch.randn(1 + SIZE, SIZE, generator=g, dtype=torch.float64)
    old = theta + torch.cat([torch.zeros(1, SIZE), torch.ones(SIZE, SIZE)]) * torch.randn(
        1 + SIZE, SIZE, generator=g, dtype=torch.float64
    )
    rewards = torch.randn(SIZE * SIZE, 1, generator=g, dtype=torch.float64)
    live = theta.clone().requires_grad_()
    (true,) = torch.autograd.grad(-(responses(live).sum(1, keepdim=True).exp() * rewards).sum(), live)
    second = torch.cat([torch.zeros_like(rewards), rewards], dim=1)
    for changes in ({"pg_variant": "cispo", "pg_clip_low": 0.999999, "pg_clip_high": 1e9}, {"pg_clip_high": 1e9}):
        found = mean_gradient(theta, old, second, config(**{"pg_clip_low": 0.999999, **changes}))
        torch.testing.assert_close(found[1:], true[1:], atol=1e-14, rtol=0)


@pytest.mark.parametrize("distance", [0.0, 0.5])
def test_the_mean_gradient_of_gspo_is_that_of_the_geometric_mean(distance: float) -> None:
    g = torch.Generator().manual_seed(7)
    theta = torch.randn(1 + SIZE, SIZE, generator=g, dtype=torch.float64)
    old = theta + distance * torch.randn(1 + SIZE, SIZE, generator=g, dtype=torch.float64)
    advantages = torch.randn(SIZE * SIZE, 1, generator=g, dtype=torch.float64).expand(-1, 2)
    found = mean_gradient(theta, old, advantages, config(**SEQ, pg_clip_low=0.999999, pg_clip_high=1e9))
    wanted = exact(
        theta, old, advantages, lambda live, sampled: (live - sampled).mean(1, keepdim=True).exp().expand(-1, 2)
    )
    torch.testing.assert_close(found, wanted, atol=1e-14, rtol=0)


# Tokens chosen by their entropy


@pytest.mark.parametrize("share", [0.2, 0.5, 1.0])
@pytest.mark.parametrize("weighted", [False, True])
def test_tokens_of_high_entropy_keep_their_weight(share: float, weighted: bool) -> None:
    rng = np.random.default_rng(0)
    batch = batch_of(rng.random(N) < 0.7).filled_up(4)
    entropy_N = rng.random(len(batch.loss_mask_N)).astype(np.float32)
    old_N = rng.random(len(entropy_N)).astype(np.float32) if weighted else None
    found, metrics = weigh_by_entropy(replace(batch, pg_weights_N=old_N), entropy_N, share)
    trained = sorted(float(e) for e, m in zip(entropy_N, batch.loss_mask_N, strict=True) if m)
    place = (1 - share) * (len(trained) - 1)
    below, rest = int(place), place - int(place)
    threshold = trained[below] + rest * (trained[min(below + 1, len(trained) - 1)] - trained[below])
    assert metrics == {"critic/entropy/threshold": pytest.approx(threshold)}
    before = np.ones(len(entropy_N), np.float32) if old_N is None else old_N
    wanted = [w * (not m or e >= threshold) for w, m, e in zip(before, batch.loss_mask_N, entropy_N, strict=True)]
    assert found.pg_weights_N is not None
    assert found.pg_weights_N.dtype == np.float32
    np.testing.assert_array_equal(found.pg_weights_N, np.array(wanted, np.float32))
    kept = sum(e >= threshold for e in trained)
    assert kept == pytest.approx(share * len(trained), abs=1)


def test_a_step_without_trained_tokens_has_no_threshold() -> None:
    batch = batch_of(np.zeros(N, bool))
    assert weigh_by_entropy(batch, np.zeros(N, np.float32), 0.2) == (batch, {})
