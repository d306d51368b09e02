"""Gradients of every KL term in every place: exact enumeration of a softmax of 6 against autograd of the KL."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from roll_r3.algorithms.advantages import TokenAdvantages, token_advantages
from roll_r3.algorithms.kl import MAX_K3, kl_estimate
from roll_r3.algorithms.losses.base import TokenInputs
from roll_r3.algorithms.losses.policy_loss import policy_loss
from roll_r3.algorithms.stats import TokenStats
from roll_r3.batch.batch import Batch
from roll_r3.config.algorithm import AlgorithmConfig
from roll_r3.config.derived import algorithm_of
from roll_r3.config.pipeline import RLVRConfig

SIZE = 6
SEEDS = range(5)
EXACT = 1e-12
SINGLE = 1e-6
"""Tolerance for advantages, which are fp32."""


def config(**changes: Any) -> AlgorithmConfig:
    return algorithm_of(RLVRConfig(exp_name="t", pretrain="x", actor_train={}, actor_infer={}, **changes))


def logits(seed: int, *shape: int) -> Tensor:
    return torch.randn(*(shape or (SIZE,)), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def near(base: Tensor, distance: float, seed: int) -> Tensor:
    """Return the logits with noise of this standard deviation."""
    return base + distance * logits(1000 + seed, *base.shape)


def kl_gradient(theta: Tensor, reference: Tensor, *, reverse: bool = False) -> Tensor:
    """Return the gradient of KL(policy || reference), or of KL(reference || policy) if reversed."""
    theta = theta.detach().requires_grad_()
    p, q = theta.log_softmax(-1), reference.log_softmax(-1)
    kl = (q.exp() * (q - p)).sum() if reverse else (p.exp() * (p - q)).sum()
    return torch.autograd.grad(kl, theta)[0]


def gradient_in_loss(
    theta: Tensor, old: Tensor, reference: Tensor, *, pg_weight: float = 1.0, **changes: object
) -> Tensor:
    """Return the expected gradient of the KL loss under the old policy.

    It is that of `policy_loss` on each token, weighted by its probability.
    """
    theta = theta.detach().requires_grad_()
    log_old = old.log_softmax(-1)
    tokens = TokenInputs(
        mask=torch.ones(SIZE, dtype=torch.bool),
        advantages=torch.zeros(SIZE, dtype=torch.float64),
        old_log_probs=log_old,
        ref_log_probs=reference.log_softmax(-1),
        pg_weights=torch.full((SIZE,), pg_weight),
        weights=log_old.exp(),
    )
    settings = config(use_kl_loss=True, kl_loss_coef=1.0, **changes)
    loss = policy_loss(theta.log_softmax(-1), None, tokens, settings, TokenStats())
    return torch.autograd.grad((loss * tokens.weights).sum(), theta)[0]


def error(found: Tensor, wanted: Tensor) -> float:
    return float((found - wanted).norm() / wanted.norm())


def cosine(a: Tensor, b: Tensor) -> float:
    return float(torch.nn.functional.cosine_similarity(a.flatten(), b.flatten(), dim=0))


@pytest.mark.parametrize("distance", [0.01, 0.1, 1.0])
@pytest.mark.parametrize("seed", SEEDS)
def test_k1_has_no_gradient_in_a_loss(seed: int, distance: float) -> None:
    """Reason for rejecting it there."""
    theta = logits(seed).requires_grad_()
    log_probs, reference = theta.log_softmax(-1), near(theta.detach(), distance, seed)
    estimate, _ = kl_estimate(log_probs, reference.log_softmax(-1), "k1")
    (found,) = torch.autograd.grad((log_probs.exp().detach() * estimate).sum(), theta)
    assert found.norm() < 1e-15 < 1e-3 * kl_gradient(theta, reference).norm()


@pytest.mark.parametrize("distance", [0.01, 0.1, 0.5])
@pytest.mark.parametrize("seed", SEEDS)
def test_in_the_loss_on_policy_k2_pulls_one_way_and_k3_the_other(seed: int, distance: float) -> None:
    theta = logits(seed)
    reference = near(theta, distance, seed)
    forward, backward = kl_gradient(theta, reference), kl_gradient(theta, reference, reverse=True)
    k2 = gradient_in_loss(theta, theta, reference, kl_estimator="k2")
    k3 = gradient_in_loss(theta, theta, reference, kl_estimator="k3")
    assert error(k2, forward) < EXACT
    assert error(k3, backward) < EXACT
    assert error(k3, forward) > 0.1 * distance, "so they are told apart"


@pytest.mark.parametrize("distance", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("pg_weight", [1.0, 0.7])
@pytest.mark.parametrize("seed", SEEDS)
def test_off_policy_only_the_unbiased_form_is_right(seed: int, pg_weight: float, distance: float) -> None:
    """The weights of rollout_correction do not change the term."""
    theta = logits(seed)
    old, reference = near(theta, distance, seed), near(theta, 0.4, seed + 100)
    wanted = kl_gradient(theta, reference)
    assert error(gradient_in_loss(theta, old, reference, use_unbiased_kl=True, pg_weight=pg_weight), wanted) < EXACT
    for estimator in ("k2", "k3") if distance else ():
        found = gradient_in_loss(theta, old, reference, kl_estimator=estimator, pg_weight=pg_weight)
        assert error(found, wanted) > 0.05, estimator


@pytest.mark.parametrize("seed", SEEDS)
def test_the_ratio_times_k2_would_be_wrong(seed: int) -> None:
    """Reason for use_unbiased_kl with k3 alone: with the gradient through the ratio, k2 keeps a term of its value."""
    theta = logits(seed)
    old, reference = near(theta, 0.3, seed), near(theta, 1.0, seed + 100)
    found = gradient_in_loss(theta, old, reference, use_unbiased_kl=True, kl_estimator="k2")
    assert error(found, kl_gradient(theta, reference)) > 0.05


def responses(tokens: int, log_probs: Tensor, ref_log_probs: Tensor) -> Batch:
    """Return a batch of all responses with this number of tokens, and their log-probabilities: [n, tokens]."""
    n = len(log_probs)
    zeros = np.zeros(n * tokens, np.int64)
    return Batch(
        tuple(map(str, range(n))),
        np.full(n, tokens),
        zeros,
        zeros,
        np.ones(n * tokens, bool),
        np.zeros(n * tokens, np.float32),
        old_log_probs_N=log_probs.detach().numpy().ravel(),
        ref_log_probs_N=ref_log_probs.detach().numpy().ravel(),
    )


def gradient_in_reward(theta: Tensor, reference: Tensor, settings: AlgorithmConfig) -> Tensor:
    """Average over all responses of 2 tokens, the second given the first, weighted by their probabilities.

    Args:
        theta: logits [1 + SIZE, SIZE] of the first token, and of the second after each first.
        reference: likewise.
    """
    theta = theta.detach().requires_grad_()
    first, second = (x.flatten() for x in torch.meshgrid(torch.arange(SIZE), torch.arange(SIZE), indexing="ij"))

    def of(values: Tensor) -> Tensor:
        table = values.log_softmax(-1)
        return torch.stack([table[0, first], table[1 + first, second]], dim=1)

    log_probs, n = of(theta), SIZE * SIZE
    batch = responses(2, log_probs, of(reference))
    learned = token_advantages(batch, np.ones(n), ["one"] * n, ["d"] * n, settings).advantages_N
    sampled = log_probs.detach().flatten()
    tokens = TokenInputs(
        mask=torch.ones(2 * n, dtype=torch.bool),
        advantages=torch.from_numpy(learned).double(),
        old_log_probs=sampled,
        weights=log_probs.detach().sum(1).exp().repeat_interleave(2),
    )
    loss = policy_loss(log_probs.flatten(), None, tokens, settings, TokenStats())
    return torch.autograd.grad((loss * tokens.weights).sum(), theta)[0]


def sequence_kl_gradient(theta: Tensor, reference: Tensor) -> Tensor:
    """Return KL(policy || reference) of responses: the first token's, plus the second's weighted by the first."""
    theta = theta.detach().requires_grad_()
    p, q = theta.log_softmax(-1), reference.log_softmax(-1)
    kl = (p.exp() * (p - q)).sum(-1)
    return torch.autograd.grad(kl[0] + (p[0].exp() * kl[1:]).sum(), theta)[0]


def penalty(estimator: str, **changes: object) -> RLVRConfig:
    settings = config(add_token_level_kl=True, init_kl_coef=1.0, **changes)
    return replace(settings, kl_penalty=estimator)  # k3 too, which a file may not name


@pytest.mark.parametrize("estimator", ["grpo", "reinforce"])
@pytest.mark.parametrize("distance", [0.01, 0.1, 1.0, 3.0])
@pytest.mark.parametrize("seed", SEEDS)
def test_k1_in_the_reward_is_the_kl_of_whole_responses(seed: int, distance: float, estimator: str) -> None:
    theta = logits(seed, 1 + SIZE, SIZE)
    reference = near(theta, distance, seed)
    found = gradient_in_reward(theta, reference, penalty("k1", adv_estimator=estimator))
    assert error(found, sequence_kl_gradient(theta, reference)) < SINGLE


@pytest.mark.parametrize("estimator", ["k2", "k3"])
@pytest.mark.parametrize(("distance", "share"), [(0.01, 0.01), (0.1, 0.1)])
@pytest.mark.parametrize("seed", SEEDS)
def test_others_in_the_reward_pull_a_hundred_times_less(
    seed: int, distance: float, share: float, estimator: str
) -> None:
    """Only the value acts in the reward, and it is of second order near the reference."""
    theta = logits(seed, 1 + SIZE, SIZE)
    reference = near(theta, distance, seed)
    found = gradient_in_reward(theta, reference, penalty(estimator))
    assert found.norm() < share * sequence_kl_gradient(theta, reference).norm()


@pytest.mark.parametrize("seed", SEEDS)
def test_abs_in_the_reward_pulls_elsewhere(seed: int) -> None:
    theta = logits(seed, 1 + SIZE, SIZE)
    reference = near(theta, 0.1, seed)
    found = gradient_in_reward(theta, reference, penalty("abs"))
    assert cosine(found, sequence_kl_gradient(theta, reference)) < 0.9


def advantages_of(scores: list[float], kl: list[list[float]], **changes: object) -> tuple[Batch, TokenAdvantages]:
    """Return the advantages of one group with tokens this far above the reference (nats)."""
    gaps = torch.tensor(kl, dtype=torch.float64)
    batch = responses(gaps.shape[1], torch.full_like(gaps, -1.0), -1.0 - gaps)
    settings = config(add_token_level_kl=True, **changes)
    return batch, token_advantages(batch, np.array(scores), ["one"] * len(scores), ["d"] * len(scores), settings)


@pytest.mark.parametrize("estimator", ["grpo", "reinforce"])
@pytest.mark.parametrize("coefficient", [0.001, 0.1])
def test_a_group_that_is_all_right_learns_no_more_than_its_penalty(coefficient: float, estimator: str) -> None:
    """Normalised together with the score, the penalty's noise would be -0.94 to 2.00 here for any coefficient."""
    kl = [[1.0, 1.3], [0.8, 0.9], [1.0, 2.0], [0.4, 0.6]]
    _, found = advantages_of([1.0] * 4, kl, init_kl_coef=coefficient, adv_estimator=estimator)
    wanted = -coefficient * np.array([[sum(row[t:]) for t in range(2)] for row in kl])
    np.testing.assert_allclose(found.advantages_N.reshape(4, 2), wanted, rtol=1e-6)
    np.testing.assert_allclose(found.rewards_n, wanted[:, 0])
    assert found.penalty_n == pytest.approx(-wanted[:, 0])


def test_the_penalty_comes_after_the_normalisation_and_before_the_clip() -> None:
    scores, kl = [1.0, 0.0, 0.0, 0.5], [[0.5, -0.25], [1.0, 0.0], [0.0, 2.0], [0.1, 0.2]]
    _, found = advantages_of(scores, kl, init_kl_coef=0.2, advantage_clip=0.9)
    normalised = (np.array(scores) - np.mean(scores)) / (np.std(scores, ddof=1) + 1e-6)
    whole = np.array([[a - 0.2 * sum(row[t:]) for t in range(2)] for a, row in zip(normalised, kl, strict=True)])
    assert np.abs(whole).max() > 0.9
    np.testing.assert_allclose(found.advantages_N.reshape(4, 2), whole.clip(-0.9, 0.9), rtol=1e-6)
    np.testing.assert_allclose(found.rewards_n, whole[:, 0])


def test_fillers_and_prompts_have_neither_advantage_nor_penalty() -> None:
    batch, _ = advantages_of([1.0, 0.0], [[0.5, 0.7], [1.0, 0.1]], init_kl_coef=0.1)
    mask = np.array([False, True, True, True])
    batch = replace(batch, loss_mask_N=mask).filled_up(3)
    spoilt = np.where(batch.loss_mask_N, batch.ref_log_probs_N, np.nan)
    batch = replace(batch, ref_log_probs_N=spoilt)
    found = token_advantages(
        batch, np.array([1.0, 0.0]), ["a", "a"], ["d", "d"], config(add_token_level_kl=True, init_kl_coef=0.1)
    )
    half = 0.5 / (np.std([1, 0], ddof=1) + 1e-6)
    wanted = [0, half - 0.07, -half - 0.11, -half - 0.01, 0, 0]
    np.testing.assert_allclose(found.advantages_N, wanted, rtol=1e-5)
    assert len(found.rewards_n) == 2
    assert found.penalty_clamped == 0


GAPS = [-torch.inf, -41.0, -20.5, -3.0, -2.6, -1.0, 0.0, 1.0, 10.9, 11.1, 21.0, 90.0, torch.inf]


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3", "abs"])
def test_an_estimate_is_bounded_and_a_clamped_one_has_no_gradient(estimator: str) -> None:
    live = torch.full((len(GAPS),), -41.0, requires_grad=True)
    estimate, clamped = kl_estimate(live, live.detach() - torch.tensor(GAPS), estimator)
    (gradient,) = torch.autograd.grad(estimate.sum(), live)
    low, high = (-2.61, 11.0) if estimator == "k3" else (-20.0, 20.0)
    assert clamped.tolist() == [not low <= gap <= high for gap in GAPS]
    assert estimate.abs().max() <= {"k1": 20, "abs": 20, "k2": 200, "k3": MAX_K3}[estimator]
    assert gradient[clamped].tolist() == [0.0] * int(clamped.sum())
    assert gradient.abs().max() <= {"k1": 1, "abs": 1, "k2": 20, "k3": 12.5}[estimator]
    d = torch.tensor(GAPS)[~clamped]
    whole = {"k1": d, "abs": d.abs(), "k2": d**2 / 2, "k3": (-d).exp() - 1 + d}[estimator]
    torch.testing.assert_close(estimate[~clamped], whole, atol=1e-4, rtol=1e-5)


def test_one_token_far_from_the_reference_neither_spoils_the_loss_nor_goes_uncounted() -> None:
    live = torch.tensor([-41.0, -1.0], requires_grad=True)
    reference = torch.tensor([-1.0, -1.1])
    for ref, changes in ((reference, {}), (reference - torch.tensor([torch.inf, 0]), {"use_unbiased_kl": True})):
        stats = TokenStats()
        tokens = TokenInputs(
            mask=torch.tensor([True, True]),
            advantages=torch.zeros(2),
            old_log_probs=live.detach(),
            ref_log_probs=ref,
            weights=torch.tensor([0.5, 0.5]),
        )
        loss = policy_loss(live, None, tokens, config(use_kl_loss=True, kl_loss_coef=1.0, **changes), stats)
        (gradient,) = torch.autograd.grad((loss * tokens.weights).sum(), live)
        assert loss[0] == MAX_K3
        assert gradient[0] == 0 != gradient[1]
        assert stats.reduce()["actor/kl_clamped"] == 0.5
    _, found = advantages_of([1.0, 0.0], [[-40.0, 0.1], [0.2, 0.1]], init_kl_coef=0.001)
    assert found.penalty_clamped == 0.25
    assert found.advantages_N[0] == pytest.approx(0.5 / np.std([1, 0], ddof=1) + 0.0199, rel=1e-5)


def test_a_clamped_log_ratio_leaves_the_ratio_without_a_gradient_too() -> None:
    """Otherwise the constant of the clamp would act through the ratio."""
    live = torch.tensor([-1.0, -1.0], requires_grad=True)
    ratio = (live - live.detach() - 3.0).exp()
    estimate, clamped = kl_estimate(live, live.detach() - torch.tensor([21.0, 2.0]), "k3", ratio)
    (gradient,) = torch.autograd.grad(estimate.sum(), live)
    assert estimate[0] < 1.0 < MAX_K3
    assert clamped.tolist() == [True, False]
    assert gradient[0] == 0
    assert gradient[1] == pytest.approx(2.0 * np.exp(-3.0), rel=1e-5)
