"""Each estimator against a plain loop in fp64, and the corners: lone samples, equal scores, masked domains, fillers."""

from __future__ import annotations

import math
import statistics
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from roll_r3.algorithms.advantages import token_advantages
from roll_r3.algorithms.advantages.estimators import ESTIMATORS
from roll_r3.config.algorithm import AlgorithmConfig
from roll_r3.config.pipeline import RLVRConfig
from tests.unit.algorithms.advantage_samples import FILLERS, Sample, batch_of, computed, config, samples

TOLERANCE = 2e-7
"""Relative; advantages are stored in fp32."""
PLUS_PLUS = "reinforce_plus_plus_baseline"
CASES: dict[str, dict[str, Any]] = {
    "grpo": {},
    "dr-grpo": {"norm_adv_by_std_in_grpo": False},
    "rloo": {"adv_estimator": "rloo"},
    "plus-plus": {"adv_estimator": PLUS_PLUS},
    "reinforce": {"adv_estimator": "reinforce"},
    "no-baseline": {"adv_estimator": "reinforce", "norm_mean_type": None},
    "group-mean": {"adv_estimator": "reinforce", "norm_mean_type": "group"},
    "group-batch": {"adv_estimator": "reinforce", "norm_mean_type": "group", "norm_std_type": "batch"},
    "group-group": {"adv_estimator": "reinforce", "norm_mean_type": "group", "norm_std_type": "group"},
    "batch-batch": {"adv_estimator": "reinforce", "norm_std_type": "batch"},
}


def one_reward(s: Sample, place: int, chosen: list[Sample], c: AlgorithmConfig) -> float:
    """Compute the reward of one sample by its formula."""
    group = [p.score for p in chosen if p.group == s.group]
    domain = [p.score for p in chosen if p.domain == s.domain]
    if c.adv_estimator == "rloo":
        others = [p.score for i, p in enumerate(chosen) if p.group == s.group and i != place]
        return s.score - statistics.fmean(others) if others else 0.0
    if c.adv_estimator == PLUS_PLUS:
        return s.score - statistics.fmean(group)
    if c.adv_estimator == "grpo":
        centre, spread = group, group if c.norm_adv_by_std_in_grpo else []
    else:
        scopes = {"group": group, "batch": domain, None: []}
        centre, spread = scopes[c.norm_mean_type], scopes[c.norm_std_type]
    value = s.score - (statistics.fmean(centre) if centre else 0.0)
    return value / (statistics.stdev(spread) + 1e-6) if len(spread) > 1 else value


def token_loop(chosen: list[Sample], c: AlgorithmConfig) -> list[list[float]]:
    """Return the advantage of each token of each response."""
    rewards = [one_reward(s, i, chosen, c) for i, s in enumerate(chosen)]
    if c.adv_estimator == PLUS_PLUS:
        tokens = [r for s, r in zip(chosen, rewards, strict=True) for _ in range(s.length)]
        centre, deviation = statistics.fmean(tokens), math.sqrt(statistics.variance(tokens) + 1e-8)
        rewards = [(r - centre) / deviation for r in rewards]
    if c.advantage_clip is not None:
        rewards = [max(-c.advantage_clip, min(c.advantage_clip, r)) for r in rewards]
    return [[r] * s.length for s, r in zip(chosen, rewards, strict=True)]


@pytest.mark.parametrize("clip", [None, 0.5])
@pytest.mark.parametrize("changes", CASES.values(), ids=CASES)
def test_an_estimator_equals_its_loop(changes: dict[str, Any], clip: float | None) -> None:
    """Groups have 4, 3 or 2 samples, domains 2 and 4 groups."""
    c = config(**changes, advantage_clip=clip)
    for seed in range(10):
        chosen = samples(seed)
        batch, found = computed(chosen, c)
        wanted = np.concatenate(token_loop(chosen, c))
        np.testing.assert_allclose(found.advantages_N[batch.loss_mask_N], wanted, rtol=TOLERANCE, atol=TOLERANCE)
        assert not found.advantages_N[~batch.loss_mask_N].any()
        rewards = [one_reward(s, i, chosen, c) for i, s in enumerate(chosen)]
        np.testing.assert_allclose(found.rewards_n, rewards, rtol=1e-12, atol=1e-12)
        assert (found.penalty_n, found.penalty_clamped) == (None, None)
        assert set(found.metrics) == ({"critic/advantage_clip_frac"} if clip else set())


def test_every_value_of_the_setting_has_an_estimator() -> None:
    assert set(ESTIMATORS) == set(RLVRConfig.model_fields["adv_estimator"].annotation.__args__)
    assert {c.get("adv_estimator", "grpo") for c in CASES.values()} == set(ESTIMATORS)


def scored(scores: list[float], groups: str, domains: str = "", **more: Any) -> list[Sample]:
    """Return responses of 2 tokens with these scores; a letter names each one's group and domain."""
    return [
        Sample(score, group, domain, 2, 2, False, [-1.0, -1.0], [-1.0, -1.0])
        for score, group, domain in zip(scores, groups, domains or "d" * len(scores), strict=True)
    ]


EQUAL = [0.1, 1 / 3, 0.7, -1e9, 1e-30]


@pytest.mark.parametrize("name", [name for name in CASES if name != "no-baseline"])
def test_equal_scores_teach_exactly_nothing(name: str) -> None:
    """The mean of 0.1, 0.1, 0.1 is not 0.1 in floating point; divided by 1e-6, the difference would be learned."""
    assert np.mean([0.1] * 3) != 0.1
    for value in EQUAL:
        _, found = computed(scored([value] * 3, "aaa"), config(**CASES[name]))
        assert not found.advantages_N.any()
        assert not found.rewards_n.any()


def test_whitened_equal_advantages_are_exactly_nothing_either() -> None:
    c = config(adv_estimator="reinforce", norm_mean_type=None, whiten_advantages=True)
    for value in EQUAL:
        _, found = computed(scored([value] * 3, "abc"), c)
        assert not found.advantages_N.any()


@pytest.mark.parametrize("name", CASES)
def test_a_lone_sample_has_its_score_or_nothing(name: str) -> None:
    """Nothing to compare with: no NaN, and no division."""
    _, found = computed(scored([0.75], "a"), config(**CASES[name]))
    assert found.rewards_n.tolist() == [0.75 if name == "no-baseline" else 0.0]
    lone = computed(scored([0.75, 1.0, 0.0], "abb"), config(**CASES[name]))[1].rewards_n[0]
    assert np.isfinite(lone)
    if name in ("grpo", "dr-grpo", "rloo", "plus-plus", "group-mean", "group-group"):
        assert lone == 0


WHITENED = {"adv_estimator": "reinforce", "norm_mean_type": None, "whiten_advantages": True}


def test_whitening_is_within_a_domain_and_over_trained_tokens() -> None:
    chosen = samples(3)
    batch, found = computed(chosen, config(**WHITENED, max_len_mask=True))
    kept = [s for s in chosen if not s.truncated]
    assert 0 < len(kept) < len(chosen)
    domain_N = batch.per_sample(np.array([s.domain for s in chosen] + [""] * FILLERS))
    for domain in ("math", "code"):
        trained = found.advantages_N[(domain_N == domain) & batch.loss_mask_N]
        assert len(trained) == sum(s.length for s in kept if s.domain == domain)
        assert trained.mean(dtype=float) == pytest.approx(0, abs=1e-7)
        assert trained.std(dtype=float, ddof=1) == pytest.approx(1, abs=1e-6)


def test_plus_plus_is_whitened_over_the_whole_step() -> None:
    chosen = samples(3)
    batch, found = computed(chosen, config(adv_estimator=PLUS_PLUS))
    trained = found.advantages_N[batch.loss_mask_N]
    assert (trained.mean(dtype=float), trained.std(dtype=float, ddof=1)) == pytest.approx((0, 1), abs=1e-6)
    domain_N = batch.per_sample(np.array([s.domain for s in chosen] + [""] * FILLERS))
    of_domain = [
        found.advantages_N[(domain_N == domain) & batch.loss_mask_N].std(ddof=1) for domain in ("math", "code")
    ]
    assert abs(of_domain[0] - of_domain[1]) > 0.05, "so the domains are told apart"


def test_a_domain_without_trained_tokens_leaves_the_others_as_they_are() -> None:
    chosen = samples(5)
    cut = [replace(s, truncated=s.domain == "math") for s in chosen]
    batch, found = computed(cut, config(**WHITENED, max_len_mask=True))
    _, alone = computed([s for s in chosen if s.domain == "code"], config(**WHITENED))
    assert np.isfinite(found.advantages_N).all()
    np.testing.assert_array_equal(found.advantages_N[batch.loss_mask_N], alone.advantages_N[alone.advantages_N != 0])


@pytest.mark.parametrize("name", CASES)
def test_a_step_without_trained_tokens_has_advantages_of_zero_and_no_warnings(name: str) -> None:
    c = config(
        **CASES[name], max_len_mask=True, add_token_level_kl=True, init_kl_coef=0.1, reward_clip=1, advantage_clip=1
    )
    with np.errstate(all="raise"):
        _, found = computed([replace(s, truncated=True) for s in samples(1)], replace(c, whiten_advantages=True))
    assert not found.advantages_N.any()
    assert found.penalty_clamped == 0
    assert found.metrics["critic/advantage_clip_frac"] == found.metrics["critic/token_reward_clip_frac"] == 0


def test_one_trained_token_is_not_whitened() -> None:
    chosen = [
        replace(s, truncated=bool(i), length=1, log_probs=[-1.0], ref_log_probs=[-1.0])
        for i, s in enumerate(scored([0.75, 0.5], "ab"))
    ]
    batch, found = computed(chosen, config(**WHITENED, max_len_mask=True))
    assert found.advantages_N[batch.loss_mask_N].tolist() == [0.75]


def test_masked_samples_stay_in_the_baseline() -> None:
    chosen = scored([1.0, 0.0, 0.0, 0.0], "aaaa")
    cut = [replace(s, truncated=i == 0) for i, s in enumerate(chosen)]
    _, whole = computed(chosen, config())
    batch, found = computed(cut, config(max_len_mask=True))
    np.testing.assert_array_equal(found.rewards_n, whole.rewards_n)
    np.testing.assert_array_equal(found.advantages_N, np.where(batch.loss_mask_N, whole.advantages_N, 0))
    assert found.advantages_N.any()
    assert not found.advantages_N[: cut[0].prompt - 1 + cut[0].length].any()


def test_clips_are_counted() -> None:
    chosen = scored([3.0, -3.0, 0.5, 0.0], "abcd")
    c = config(adv_estimator="reinforce", norm_mean_type=None, reward_clip=2, advantage_clip=1)
    _, found = computed(chosen, c)
    assert found.rewards_n.tolist() == [2.0, -2.0, 0.5, 0.0]
    assert found.metrics == {"critic/reward_clip_frac": 0.5, "critic/advantage_clip_frac": 0.5}
    kl = [replace(s, ref_log_probs=[-4.0, -1.0]) for s in chosen]
    batch, found = computed(kl, replace(c, add_token_level_kl=True, init_kl_coef=1.0))
    assert found.metrics["critic/token_reward_clip_frac"] == 0.5  # the first token of each loses 3 nats
    assert found.rewards_n.tolist() == [0.0, -4.0, -1.5, -2.0]
    assert found.penalty_n is not None
    assert found.penalty_n.tolist() == [3.0] * 4, "before the clip"
    assert found.advantages_N[batch.loss_mask_N].tolist() == [0, 1, -1, -1, -1, 0.5, -1, 0]


@pytest.mark.parametrize("name", CASES)
def test_values_do_not_depend_on_the_order_of_samples(name: str) -> None:
    chosen = samples(7)
    c = replace(config(**CASES[name], max_len_mask=True), add_token_level_kl=True, init_kl_coef=0.1, reward_clip=1.5)
    c = replace(c, whiten_advantages=True, difficulty_mask=True)
    order = np.random.default_rng(0).permutation(len(chosen))
    batch, found = computed(chosen, c)
    _, shuffled = computed([chosen[i] for i in order], c)
    np.testing.assert_allclose(shuffled.rewards_n, found.rewards_n[order], rtol=1e-12, atol=1e-12)
    inputs = batch.inputs_of(order)
    np.testing.assert_allclose(
        shuffled.advantages_N[: len(inputs)], found.advantages_N[inputs], rtol=TOLERANCE, atol=TOLERANCE
    )


def test_fillers_do_not_change_a_value() -> None:
    chosen = samples(2)
    arguments = (np.array([s.score for s in chosen]), [s.group for s in chosen], [s.domain for s in chosen])
    for changes in ({}, WHITENED, {"adv_estimator": PLUS_PLUS}):
        alone, filled = (token_advantages(batch_of(chosen, n), *arguments, config(**changes)) for n in (0, FILLERS))
        np.testing.assert_array_equal(filled.advantages_N[: len(alone.advantages_N)], alone.advantages_N)
        assert not filled.advantages_N[len(alone.advantages_N) :].any()
