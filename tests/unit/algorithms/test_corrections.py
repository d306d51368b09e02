"""Corrections between rollout and trainer against values worked out by hand, and against exact gradients."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from roll_r3.algorithms.corrections import corrected
from roll_r3.algorithms.losses.base import TokenInputs
from roll_r3.algorithms.losses.policy_loss import policy_loss
from roll_r3.algorithms.mismatch import mismatch_metrics
from roll_r3.algorithms.stats import TokenStats
from roll_r3.batch.batch import Batch
from roll_r3.config.derived import algorithm_of
from roll_r3.config.pipeline import RLVRConfig
from roll_r3.config.sections import RolloutCorrectionConfig
from roll_r3.tracking.names import declared_order

RATIOS = [[1, 2, 4, 1], [0.5, 0.5, 1, 1], [8, 1, 0.25, 1]]
"""pi_old / pi_rollout of 3 samples x 4 tokens. Products: 8, 0.25, 2; geometric means: their fourth roots."""
ROLLOUT = [[0.1, 0.2, 0.1, 0.5], [0.8, 0.4, 0.3, 0.9], [0.1, 0.6, 0.8, 0.2]]
"""pi_rollout."""
ADVANTAGES = [1.0, -2.0, 0.5]


def batch_of(ratios: Any = RATIOS, rollout: Any = ROLLOUT, advantages: Any = ADVANTAGES) -> Batch:
    """Return samples of a prompt token and the given ones, and a filler; untrained tokens hold nonsense."""
    n, tokens = np.array(ratios).shape
    mask = np.tile(np.r_[False, np.ones(tokens, bool)], n)
    logs = np.zeros((2, mask.size))
    logs[:, mask] = np.log(rollout).ravel(), np.log(np.multiply(rollout, ratios)).ravel()
    logs[:, ~mask] = [[0], [-90]]
    batch = Batch(
        tuple(map(str, range(n))),
        np.full(n, tokens + 1),
        np.arange(mask.size),
        np.arange(mask.size),
        mask,
        logs[0].astype(np.float32),
        old_log_probs_N=logs[1].astype(np.float32),
        advantages_N=np.where(mask, np.repeat(advantages, tokens + 1), 0).astype(np.float32),
    )
    return batch.filled_up(n + 1)


def correct(batch: Batch, **fields: Any) -> tuple[Batch, dict[str, float]]:
    found = corrected(batch, RolloutCorrectionConfig(**fields))
    assert declared_order(found.metrics)[1] == []
    return found.batch, found.metrics


def table(batch: Batch, values_N: Any) -> list[list[float]]:
    """Return the values of the trained tokens before filters; those of others must be 0."""
    whole = batch_of()
    assert not np.any(values_N[~whole.loss_mask_N])
    return values_N[whole.loss_mask_N].reshape(3, 4).tolist()


ROOTS = [8**0.25, 0.25**0.25, 2**0.25]
BANDED = [[1, 2, 4, 1], [0.5, 0.5, 1, 1], [0, 1, 0, 1]]
WEIGHTS = [
    ({"is_weight": "token", "is_cap": 3}, [[1, 2, 3, 1], [0.5, 0.5, 1, 1], [3, 1, 0.25, 1]], 2 / 12),
    ({"is_weight": "token", "is_cap": None}, RATIOS, 0),
    ({"is_weight": "token", "is_cap": 5, "is_floor": 0.4}, BANDED, 2 / 12),  # IcePop
    ({"is_weight": "token", "is_cap": 1, "is_floor": 0.4}, [[1, 0, 0, 1], [0.5, 0.5, 1, 1], [0, 1, 0, 1]], 4 / 12),
    ({"is_weight": "sequence", "is_cap": 3}, [[3] * 4, [0.25] * 4, [2] * 4], 4 / 12),
    ({"is_weight": "sequence", "is_cap": 3, "is_floor": 0.5}, [[0] * 4, [0] * 4, [2] * 4], 8 / 12),
    ({"is_weight": "geometric", "is_cap": 1.5}, [[1.5] * 4, [ROOTS[1]] * 4, [ROOTS[2]] * 4], 4 / 12),
]


@pytest.mark.parametrize(("fields", "wanted", "outside"), WEIGHTS)
def test_weights(fields: dict[str, Any], wanted: Any, outside: float) -> None:
    before = batch_of()
    batch, metrics = correct(before, **fields)
    assert batch.pg_weights_N is not None
    np.testing.assert_allclose(table(batch, batch.pg_weights_N), wanted, rtol=1e-6)
    np.testing.assert_array_equal(batch.loss_mask_N, before.loss_mask_N)
    np.testing.assert_array_equal(batch.advantages_N, before.advantages_N)
    assert metrics["actor/is_weight_mean"] == pytest.approx(np.mean(wanted))
    assert metrics["actor/is_weight_clipfrac"] == pytest.approx(outside)
    assert metrics["rollout_corr/ess"] == pytest.approx(np.mean(wanted) ** 2 / np.mean(np.square(wanted)))


ALL, NONE = [1] * 4, [0] * 4
FILTERS = [
    ({"level": "token", "low": 0.4, "high": 3}, [[1, 1, 0, 1], ALL, [0, 1, 0, 1]]),
    ({"level": "token", "high": 5}, [ALL, ALL, [0, 1, 1, 1]]),
    ({"level": "token", "low": 1}, [ALL, [0, 0, 1, 1], [1, 1, 0, 1]]),  # bounds are kept
    ({"level": "sequence", "low": 0.3, "high": 3}, [NONE, NONE, ALL]),
    ({"level": "geometric", "low": 0.8, "high": 2}, [ALL, NONE, ALL]),
    # differences: 0, 0.2, 0.3, 0; -0.4, -0.2, 0, 0; 0.7, 0, -0.6, 0
    ({"statistic": "diff", "low": -0.3, "high": 0.25}, [[1, 1, 0, 1], [0, 1, 1, 1], [0, 1, 0, 1]]),
    ({"statistic": "diff", "level": "sequence", "low": -0.5, "high": 0.4}, [NONE, NONE, ALL]),
    ({"statistic": "diff", "level": "geometric", "low": -0.2, "high": 0.1}, [NONE, ALL, ALL]),
    # k3 of 1, 2, 4, 0.5, 8, 0.25: 0, 0.307, 1.614, 0.193, 4.921, 0.636
    ({"statistic": "k3", "high": 0.5}, [[1, 1, 0, 1], ALL, [0, 1, 0, 1]]),
    ({"statistic": "k3", "level": "geometric", "high": 0.1}, [NONE, ALL, NONE]),
    ({"statistic": "k3", "level": "sequence", "high": 2}, [ALL, ALL, NONE]),
]


@pytest.mark.parametrize(("item", "kept"), FILTERS)
def test_filters(item: dict[str, Any], kept: Any) -> None:
    batch, metrics = correct(batch_of(), filters=[item])
    assert table(batch, batch.loss_mask_N) == kept
    assert table(batch, batch.advantages_N) == (np.array(kept) * np.array(ADVANTAGES)[:, None]).tolist()
    assert batch.pg_weights_N is None
    assert metrics["rollout_corr/rejected_tokens"] == pytest.approx(1 - np.mean(kept))
    assert metrics["rollout_corr/rejected_samples"] == pytest.approx(np.mean([not any(row) for row in kept]))


@pytest.mark.parametrize(("advantage", "ratio", "weight"), [(-1, 0.5, 0), (-1, 2, 1), (1, 0.5, 1), (1, 2, 1)])
def test_only_samples_pushed_down_and_grown_unlikely_are_masked(advantage: float, ratio: float, weight: float) -> None:
    whole = batch_of([[ratio] * 4] * 3, advantages=[advantage] * 3)
    batch, metrics = correct(whole, opsm_delta=0.6)
    assert table(batch, batch.pg_weights_N) == [[weight] * 4] * 3
    assert metrics == {"rollout_corr/opsm_samples": 1 - weight}
    np.testing.assert_array_equal(batch.loss_mask_N, whole.loss_mask_N)
    mild, _ = correct(whole, opsm_delta=0.7)  # log 2 is 0.693
    assert table(mild, mild.pg_weights_N) == [[1] * 4] * 3


def test_the_sign_of_a_sample_is_that_of_its_sum() -> None:
    """A KL penalty gives tokens of one sample advantages of both signs."""
    whole = batch_of([[0.5] * 4] * 3)
    advantages = np.zeros(whole.loss_mask_N.size, np.float32)
    advantages[whole.loss_mask_N] = np.ravel([[1, 1, -3, 0], [-1, -1, 3, 0], [1, -1, 0, 0]])
    batch, _ = correct(replace(whole, advantages_N=advantages), opsm_delta=0.5)
    assert table(batch, batch.pg_weights_N) == [[0] * 4, [1] * 4, [1] * 4]


def test_parts_see_the_batch_as_it_came_in_any_order() -> None:
    items = [item for item, _ in FILTERS[:5]]
    rest = {"is_weight": "geometric", "is_cap": 1.5, "opsm_delta": 0.1}
    alone, _ = correct(batch_of(), **rest)
    found = [correct(batch_of(), filters=order, **rest)[0] for order in itertools.permutations(items)]
    kept = np.logical_and.reduce([np.array(rows) for _, rows in FILTERS[:5]])
    for batch in found:
        assert table(batch, batch.loss_mask_N) == kept.tolist()
        weights = np.where(batch.loss_mask_N, alone.pg_weights_N, 0)
        np.testing.assert_array_equal(batch.pg_weights_N, weights)
    turned = batch_of().select([2, 3, 0, 1])
    again, metrics = correct(turned, filters=items, **rest)
    np.testing.assert_array_equal(again.pg_weights_N, found[0].select([2, 3, 0, 1]).pg_weights_N)
    assert metrics == pytest.approx(correct(batch_of(), filters=items, **rest)[1])


def test_weights_that_came_with_the_batch_are_multiplied() -> None:
    whole = batch_of()
    given = replace(whole, pg_weights_N=np.where(whole.loss_mask_N, np.float32(0.5), np.float32(0)))
    batch, _ = correct(given, is_weight="token", is_cap=None)
    np.testing.assert_allclose(table(batch, batch.pg_weights_N), np.array(RATIOS) / 2, rtol=1e-6)


def test_equal_ratios_are_a_whole_sample() -> None:
    for fields in ({"is_weight": level, "is_cap": None} for level in ("token", "sequence", "geometric")):
        assert correct(batch_of([[1.5] * 4] * 3), **fields)[1]["rollout_corr/ess"] == pytest.approx(1)


@pytest.mark.parametrize("level", ["token", "sequence", "geometric"])
@pytest.mark.parametrize("gap", [1e4, -1e4])
def test_huge_gaps_give_no_overflow(level: str, gap: float) -> None:
    whole = batch_of()
    far = np.where(whole.loss_mask_N, whole.rollout_log_probs_N + np.float32(gap), np.nan).astype(np.float32)
    items = [{"statistic": s, "level": level, "high": 2} for s in ("ratio", "k3")]
    with np.errstate(all="raise", under="ignore"):
        batch, _ = correct(replace(whole, old_log_probs_N=far), is_weight=level, is_cap=None, opsm_delta=1.0)
        correct(replace(whole, old_log_probs_N=far), filters=items)
    assert np.isfinite(batch.pg_weights_N).all()


def test_samples_without_trained_tokens_count_nowhere() -> None:
    whole = batch_of()
    everything = {"filters": [{"high": 2}], "is_weight": "sequence", "opsm_delta": 1.0}
    _, expected = correct(whole.select([0, 2]), **everything)
    mask = whole.loss_mask_N.copy()
    mask[5:10] = False
    batch, metrics = correct(replace(whole, loss_mask_N=mask), **everything)
    assert metrics == pytest.approx(expected)
    assert not batch.loss_mask_N[5:10].any()
    empty, metrics = correct(replace(whole, loss_mask_N=np.zeros_like(mask)), **everything)
    assert not empty.loss_mask_N.any()
    assert set(metrics.values()) == {0.0}


@pytest.mark.parametrize("level", ["token", "sequence"])
def test_without_a_cap_the_gradient_is_unbiased(level: str) -> None:
    """Enumerate a bandit: rollout samples, old policy learns; the expected gradient is that of the mean reward.

    A response is one token of 6; its product and its ratio are the same.
    """
    generator = torch.Generator().manual_seed(3)
    theta, rollout = torch.randn(2, 6, generator=generator, dtype=torch.float64)
    theta.requires_grad_()
    rewards = torch.arange(6.0, dtype=torch.float64)
    (wanted,) = torch.autograd.grad((theta.softmax(-1) * rewards).sum(), theta)

    def gradient(weights: torch.Tensor | None) -> torch.Tensor:
        live = theta.log_softmax(-1)
        tokens = TokenInputs(
            mask=torch.ones(6, dtype=torch.bool),
            advantages=rewards,
            old_log_probs=live.detach(),
            pg_weights=weights,
            weights=rollout.softmax(-1),
        )
        settings = algorithm_of(RLVRConfig(exp_name="t", pretrain="x", actor_train={}, actor_infer={}))
        loss = policy_loss(live, None, tokens, settings, TokenStats())
        return -torch.autograd.grad((loss * tokens.weights).sum(), theta)[0]

    old = theta.detach().softmax(-1)
    sampled = rollout.softmax(-1)
    batch = batch_of((old / sampled)[:, None].tolist(), sampled[:, None].tolist(), [1.0] * 6)
    errors = []
    for fields in ({"is_cap": 1.1}, {"is_cap": 2}, {"is_cap": None}):
        found, _ = correct(batch, is_weight=level, **fields)
        weights = torch.from_numpy(found.pg_weights_N[batch.loss_mask_N]).double()
        errors.append(float((gradient(weights) - wanted).norm() / wanted.norm()))
    assert errors[-1] < 1e-6 < 0.01 < errors[1] < errors[0]
    assert (gradient(None) - wanted).norm() > 0.1 * wanted.norm()


def test_figures_of_the_mismatch() -> None:
    ratios, products = np.array([1, 2.2, 4, 1, 0.6, 0.4, 1, 1, 5, 1, 0.25, 1]), np.array([8.8, 0.24, 1.25])
    batch = batch_of(ratios.reshape(3, 4))
    m = mismatch_metrics(batch, batch.loss_mask_N)
    assert m["rollout_corr/chi2_token"] == pytest.approx(np.mean(ratios**2) - 1)
    assert m["rollout_corr/chi2_seq"] == pytest.approx(np.mean(products**2) - 1)
    assert m["rollout_corr/max_seq_log_ratio"] == pytest.approx(np.log(8.8))
    assert m["rollout_corr/ess"] == pytest.approx(np.mean(ratios) ** 2 / np.mean(ratios**2))
    assert m["rollout_corr/k3_kl"] == pytest.approx(np.mean(ratios - 1 - np.log(ratios)), rel=1e-5)
    assert m["rollout_corr/kl"] == pytest.approx(np.mean(-np.log(ratios)), rel=1e-5)
    assert m["rollout_corr/extreme_ratio_tau2"] == pytest.approx(5 / 12)
    assert m["training/rollout_probs_diff_max"] == pytest.approx(0.6)
    assert declared_order(m)[1] == []
    untrained = replace(batch, loss_mask_N=np.zeros_like(batch.loss_mask_N))
    assert mismatch_metrics(untrained, batch.loss_mask_N) == m
    assert mismatch_metrics(batch, untrained.loss_mask_N) == {}
