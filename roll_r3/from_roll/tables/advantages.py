"""Advantages: estimator, norms, clips, whitening, masks of samples."""

from __future__ import annotations

from roll_r3.config.findings.report import ABSENT
from roll_r3.config.tree import Keys
from roll_r3.from_roll.draft import Draft
from roll_r3.from_roll.key_rows import ByStep, Custom, Row, Same, Step, Unread, Unsupported

_ESTIMATORS = ("gae", "skip_obs_gae", "gigpo", "step_reinforce", "agentic_reinforce", "flowgrpo", "diffnft")
_WITH_CRITIC = ("gae", "skip_obs_gae")
_OF_CRITIC = ("critic", "critic_epochs", "value_clip", "lambd", "l2")
_UNSUPPORTED_ESTIMATOR = "there is no critic and no such estimator: write grpo, or reinforce with its norms"
_NORMS = ("norm_mean_type", "norm_std_type")
_RUNNING = "a norm is over a group or a step, not over all steps so far: write group, batch or null"
_THRESHOLDS = ("difficulty_low_threshold", "difficulty_high_threshold")
_NOT_READ = "ROLL's RLVR pipeline does not read it"


def _critic(draft: Draft) -> None:
    """Reject settings of the critic together with gae. With any other estimator ROLL does not read them."""
    estimator = draft.get("adv_estimator")
    if estimator in _WITH_CRITIC or (estimator is ABSENT and draft.is_rolls):
        for key in _OF_CRITIC:
            if draft.has(key):
                draft.refuse(key, "it belongs to gae's critic, and there is no critic")


def _estimator(draft: Draft) -> None:
    """Reject unsupported estimators and norms; drop norms beside grpo, with norms of its own."""
    estimator = draft.get("adv_estimator")
    if estimator is ABSENT and draft.is_rolls:
        draft.refuse("adv_estimator", f"ROLL's default is gae; {_UNSUPPORTED_ESTIMATOR}")
    elif estimator in _ESTIMATORS:
        draft.refuse("adv_estimator", _UNSUPPORTED_ESTIMATOR)
    for key in _NORMS:
        value = draft.get(key)
        if value == "None":
            draft.put(key, None, key)
        elif value == "running":
            draft.refuse(key, _RUNNING)
        if draft.is_rolls and estimator != "reinforce":
            draft.unread(key, empty=(None, "group"))


def _reward_clip(draft: Draft) -> None:
    if draft.is_rolls and draft.get("reward_clip") in (None, 0):  # and false
        draft.drop("reward_clip")


def _difficulty(draft: Draft) -> None:
    """Turn the mask off for groups of one response, as ROLL does, and drop thresholds without a mask."""
    if not draft.is_rolls:
        return
    if draft.get("difficulty_mask") is True and draft.get("num_return_sequences_in_group") in (ABSENT, 1):
        why = "ROLL masks no sample by difficulty in groups of one response"
        draft.translate("difficulty_mask", {"difficulty_mask": False}, why)
    if draft.get("difficulty_mask") in (ABSENT, None, False):
        for key in _THRESHOLDS:
            draft.unread(key)


def _off_or_unread(draft: Draft, keys: Keys) -> None:
    draft.unread(keys, empty=(None, False, "None"))


def _off_or_refused(draft: Draft, keys: Keys) -> None:
    """Drop ROLL's false; reject a number, without effect in ROLL but with one here."""
    value = draft.get(keys)
    if draft.is_rolls and value in (None, False):
        draft.drop(keys)
    elif draft.is_rolls:
        draft.refuse(keys, f"{_NOT_READ}: remove it, or write it into the file after `--print-config`")


STEPS: tuple[Step, ...] = (_critic, _estimator, _reward_clip, _difficulty)

ROWS = (
    Row("adv_estimator", ByStep(f"`grpo` and `reinforce`: the same; others: {_UNSUPPORTED_ESTIMATOR}")),
    Row(
        _NORMS,
        ByStep(
            "the same with `reinforce`, within a domain as in ROLL; without effect with `grpo`. `running` is not "
            "supported"
        ),
    ),
    Row("reward_clip", ByStep("the same; `0` means off")),
    Row("advantage_clip whiten_advantages", Same()),
    Row(
        "max_len_mask",
        Same("masks truncated responses; ROLL masks by length, so it also masks one that ends in its last token"),
    ),
    Row("difficulty_mask", ByStep("the same; off with one response per prompt, as in ROLL")),
    Row(_THRESHOLDS, ByStep("the same; no effect without `difficulty_mask`")),
    Row("error_max_len_clip", Unsupported((False,), "it masks all scores other than 0 and 1")),
    Row("error_max_len_threshold mask_type", Unread("read with error_max_len_clip only, or not at all")),
    Row(
        "reward_norm use_reward_scaling use_reward_norm add_len_reward reward_normalize",
        Custom(_off_or_unread, f"no effect: {_NOT_READ}"),
    ),
    Row("reward_shift reward_scale", Custom(_off_or_refused, f"`false` only: {_NOT_READ}")),
    Row("whiten_rewards", Unsupported((False,), "rewards of tokens are not whitened: it would pay for length")),
    Row("gamma", Unsupported((1,), "a response's reward is not discounted over tokens")),
    Row("critic_warmup", Unsupported((0,), "there is no critic")),
    Row(_OF_CRITIC, Unread("of gae's critic, not supported either")),
)
