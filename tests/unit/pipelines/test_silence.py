"""Steps without a training signal are reported on the screen with their reasons."""

from __future__ import annotations

from typing import Any

import pytest

from roll_r3.config.pipeline import RLVRConfig
from roll_r3.pipelines.silence import SilenceWatch

LEARNS = {
    "critic/score/max": 1.0,
    "critic/score/min": 0.0,
    "critic/advantages/max": 1.0,
    "critic/advantages/min": -1.0,
    "actor_train/grad_norm": 0.5,
    "actor_train/optimizer_steps": 1.0,
    "actor/pg_clipfrac": 0.0,
    "tokens/truncated_ratio": 0.1,
    "reward/groups_without_signal": 0.0,
    "reward/groups_all_right": 0.0,
    "reward/groups_all_wrong": 0.0,
}
ALL_WRONG = LEARNS | {
    "critic/score/max": 0.0,
    "critic/advantages/max": 0.0,
    "critic/advantages/min": 0.0,
    "actor_train/grad_norm": 0.0,
    "reward/groups_without_signal": 1.0,
    "reward/groups_all_wrong": 1.0,
}
ALL_RIGHT = ALL_WRONG | {
    "critic/score/max": 1.0,
    "critic/score/min": 1.0,
    "reward/groups_all_right": 1.0,
    "reward/groups_all_wrong": 0.0,
}
CLIPPED = LEARNS | {"actor_train/grad_norm": 0.0, "actor/pg_clipfrac": 1.0}
LEFT_OUT = {k: v for k, v in LEARNS.items() if not k.startswith(("critic/advantages", "actor"))}
"""Step without an update."""
SKIPPED = {k: v for k, v in LEARNS.items() if k != "actor_train/grad_norm"} | {"actor_train/optimizer_steps": 0.0}


def watch(**fields: Any) -> SilenceWatch:
    given: dict[str, Any] = {"exp_name": "x", "pretrain": "p", "actor_train": {}, "actor_infer": {}}
    return SilenceWatch(RLVRConfig(**(given | fields)))


def last_of(seen: SilenceWatch, *steps: dict[str, float]) -> str | None:
    return [seen.observe(step) for step in steps][-1]


def test_a_run_that_learns_is_not_interrupted():
    assert last_of(watch(), *[LEARNS] * 20) is None


def test_the_third_silent_step_is_said_and_then_after_twice_as_many():
    seen = watch()
    said = [i for i in range(1, 30) if seen.observe(ALL_WRONG)]
    assert said == [3, 6, 12, 24]


def test_one_step_with_a_signal_begins_the_count_anew():
    assert last_of(watch(), ALL_WRONG, ALL_WRONG, LEARNS, ALL_WRONG, ALL_WRONG) is None


REASONS = {
    "all wrong": (ALL_WRONG, ["every reward is 0", "the gradient is 0", "ground_truth", "100% all wrong"]),
    "all right": (ALL_RIGHT, ["every advantage is 0", "too easy", "100% all right"]),
    "cut": (ALL_WRONG | {"tokens/truncated_ratio": 0.9}, ["90% of the responses reach response_length (1024 tokens)"]),
    "clipped": (CLIPPED, ["the gradient is 0 (for 3 steps)", "100% of the tokens have no gradient"]),
    "filtered": (
        LEFT_OUT | {"rollout_corr/rejected_tokens": 1.0},
        ["every advantage is 0", "rollout_correction reject 100% of the tokens"],
    ),
    "masked": (LEFT_OUT | {"actor/final_mask_ratio": 0.0}, ["the gradient is 0", "leave out 100% of the samples"]),
    "skipped": (SKIPPED, ["every optimizer step was skipped"]),
}


@pytest.mark.parametrize(("step", "words"), REASONS.values(), ids=REASONS)
def test_the_likely_reasons_are_given(step, words):
    said = last_of(watch(), *[step] * 3)
    assert said is not None
    for word in words:
        assert word in said


def test_the_limit_that_cuts_is_named():
    limited = watch(actor_infer={"generating_args": {"max_new_tokens": 7}})
    said = last_of(limited, *[ALL_WRONG | {"tokens/truncated_ratio": 0.9}] * 3)
    assert "reach max_new_tokens (7 tokens)" in said


def test_a_term_that_still_moves_the_weights_is_named():
    moved = ALL_WRONG | {"actor_train/grad_norm": 0.1}
    said = last_of(watch(use_kl_loss=True, reference={}), *[moved] * 3)
    assert "only the KL term moves the weights" in said
    assert "gradient is 0" not in said


@pytest.mark.parametrize(("variant", "named"), [("ppo", True), ("dppo_tv", True), ("cispo", False), ("topr", False)])
def test_truncated_weights_are_no_reason_for_a_missing_gradient(variant: str, named: bool) -> None:
    silence = watch(pg_variant=variant)
    texts = [silence.observe(CLIPPED) or "" for _ in range(8)]
    assert any(texts)
    assert any("of the tokens have no gradient" in text for text in texts) == named
