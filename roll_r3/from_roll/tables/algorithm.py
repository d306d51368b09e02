"""Advantages, clipping, KL terms, masks and corrections."""

from __future__ import annotations

import math
from typing import Any

from roll_r3.config.findings.report import ABSENT
from roll_r3.config.tree import Keys
from roll_r3.from_roll.draft import Draft, is_number
from roll_r3.from_roll.key_rows import ByStep, Custom, Renamed, Row, Same, Step, Unread, Unsupported

_ESTIMATORS = ("gae", "skip_obs_gae", "gigpo", "step_reinforce", "agentic_reinforce", "flowgrpo", "diffnft")
_WITH_CRITIC = ("gae", "skip_obs_gae")
_OF_CRITIC = ("critic", "critic_epochs", "value_clip", "lambd", "l2")
_UNSUPPORTED_ESTIMATOR = "there is no critic and no such estimator: write grpo, or reinforce with norm_mean_type: batch"
_NO_BASELINE = (
    "ROLL's reinforce without norm_mean_type has no baseline; here reinforce subtracts the batch's mean: write "
    "norm_mean_type: batch, or adv_estimator: grpo"
)
_NORMALISATION = (
    "supported are group mean and deviation, group mean alone (norm_std_type: null), and the batch's mean "
    "(norm_mean_type: batch, norm_std_type: null)"
)
_PENALTIES = {"kl": "k1", "mse": "k2"}
"""ROLL's names of KL estimates in the reward -> roll_r3's."""
_FULL = "only sampled tokens are penalized, not the whole vocabulary: write kl_penalty: kl"
_ADAPTIVE = "init_kl_coef is constant: there is no adaptive controller"
_ROLLS_NORM = (
    "ROLL divides by the padded length alone, roll_r3 by the number of responses too: set loss_scale_factor, the "
    "tokens to divide a response's sum by"
)
_PPO = "the loss is PPO's clipped loss"
_BOUNDED_RULES = ("math", "exact_match")
"""Rules with rewards in [0, 1]."""
_MASKS = (
    "train_infer_ratio_mask",
    "train_infer_diff_mask",
    "train_infer_ratio_seq_mask",
    "train_infer_diff_seq_mask",
)
_THRESHOLDS = tuple(f"{mask.removesuffix('_mask')}_threshold_{side}" for mask in _MASKS for side in ("low", "high"))
_SIDES = ("pg_clip_low", "pg_clip_high")
_CORRECTION = "rollout_correction"
_WEIGHT = "train_infer_correction.is_weight"
_FILTERS = "train_infer_correction.filters"
_FLAT_WEIGHT = "use_rollout_importance_sampling_ratio"
_FLAT_BOUND = "rollout_importance_sampling_ratio_upper_bound"
_BOUND = 1.2
"""ROLL's default bound on the weights."""


def _critic(draft: Draft) -> None:
    """Reject settings of the critic together with gae. With any other estimator ROLL does not read them."""
    estimator = draft.get("adv_estimator")
    if estimator in _WITH_CRITIC or (estimator is ABSENT and draft.is_rolls):
        for key in _OF_CRITIC:
            if draft.has(key):
                draft.refuse(key, "it belongs to gae's critic, and there is no critic")


def _advantages(draft: Draft) -> None:
    """Translate ROLL's reward normalization together with its estimator: here they are one setting."""
    estimator = draft.get("adv_estimator")
    given = {key: draft.get(key) for key in ("norm_mean_type", "norm_std_type")}
    mean, std = (None if value in (ABSENT, "None") else value for value in given.values())
    if not draft.is_rolls and mean is None and std is None:
        draft.drop("norm_mean_type")
        draft.drop("norm_std_type")
        return
    if estimator is ABSENT and draft.is_rolls:
        draft.refuse("adv_estimator", f"ROLL's default is gae; {_UNSUPPORTED_ESTIMATOR}")
    elif estimator in _ESTIMATORS:
        draft.refuse("adv_estimator", _UNSUPPORTED_ESTIMATOR)
    elif estimator == "reinforce":
        _reinforce(draft, mean, std)
        return
    elif estimator != "grpo":
        return
    for key in given:
        draft.unread(key, empty=(None, "None", "group"))


def _reinforce(draft: Draft, mean: Any, std: Any) -> None:
    if (mean, std) == ("group", "group"):
        why = "rewards minus the group's mean, divided by its deviation, are grpo"
        draft.translate("adv_estimator", {"adv_estimator": "grpo"}, why)
    elif (mean, std) == ("group", None):
        why = "rewards minus the group's mean are grpo without the deviation"
        draft.translate("adv_estimator", {"adv_estimator": "grpo", "norm_adv_by_std_in_grpo": False}, why)
    elif (mean, std) == ("batch", None):
        draft.translate("norm_mean_type", {}, "reinforce always subtracts the batch's mean")
    elif (mean, std) == (None, None):
        draft.refuse("adv_estimator", _NO_BASELINE)
    else:
        for key, value in (("norm_mean_type", mean), ("norm_std_type", std)):
            if value is not None:
                draft.refuse(key, _NORMALISATION)
    draft.drop("norm_mean_type")
    draft.drop("norm_std_type")


def _reward_clip(draft: Draft) -> None:
    """Drop a clip at or above the largest possible reward; reject any other."""
    clip = draft.get("reward_clip")
    if clip in (None, 0):
        draft.drop("reward_clip")
    elif clip is not ABSENT:
        if is_number(clip) and clip >= _largest_reward(draft):
            draft.unread("reward_clip")
        else:
            reason = "rewards are not clipped (grpo's are at most (n - 1) / sqrt(n) in groups of n responses)"
            draft.refuse("reward_clip", reason)


def _largest_reward(draft: Draft) -> float:
    """Return the largest magnitude of a reward after ROLL's normalization; infinity if unknown."""
    if draft.get("add_token_level_kl") is True:
        return math.inf  # ROLL clips rewards of tokens, minus their penalty
    size = draft.get("num_return_sequences_in_group")
    if draft.get("adv_estimator") == "grpo" and draft.get("norm_adv_by_std_in_grpo") is not False:
        return (size - 1) / math.sqrt(size) if isinstance(size, int) and size > 1 else math.inf
    rules = [draft.get(keys) for keys in draft.expand("rewards.*.reward")]
    return 1.0 if rules and all(rule in _BOUNDED_RULES for rule in rules) else math.inf


def _clip_range(draft: Draft) -> None:
    """Drop pg_clip_low and pg_clip_high without use_pg_clip_range, as ROLL does."""
    use = draft.get("use_pg_clip_range")
    if use is True:
        missing: dict[str | Keys, Any] = {key: 0.2 for key in _SIDES if draft.get(key) is ABSENT}
        draft.translate("use_pg_clip_range", missing, "pg_clip_low and pg_clip_high apply whenever they are set")
    elif use in (False, None) or (use is ABSENT and draft.is_rolls):
        draft.drop("use_pg_clip_range")
        for key in _SIDES:
            if draft.has(key):
                draft.unread(key)


def _aggregation(draft: Draft, keys: Keys) -> None:
    """Reject this mode in a file of ROLL, which means ROLL's divisor, unless it sets roll_r3's."""
    if draft.is_rolls and draft.get(keys) == "seq-mean-token-sum-norm" and not draft.has("loss_scale_factor"):
        draft.refuse(keys, _ROLLS_NORM)


def _dual_clip(draft: Draft, keys: Keys) -> None:
    clip = draft.get("pg_clip")
    clip = 0.2 if clip is ABSENT else clip
    if draft.get(keys) is False:
        draft.drop(keys)
    elif draft.get(keys) is True and is_number(clip):
        why = "ROLL bounds the loss at (1 + 2 x pg_clip) x advantage; here the factor itself is set"
        draft.translate(keys, {keys: round(1 + 2 * clip, 6)}, why)


def _kl(draft: Draft) -> None:
    """Translate the penalty's estimate; drop settings of KL terms that are off, and an unused reference."""
    penalised = draft.get("add_token_level_kl") is True
    if penalised or not draft.is_rolls:
        _penalty(draft)
    if not draft.is_rolls:
        return
    if penalised:
        if draft.has("target_kl"):
            draft.refuse("target_kl", _ADAPTIVE)
    else:
        for key in ("init_kl_coef", "kl_penalty"):
            if draft.has(key):
                draft.unread(key)
    if draft.get("use_kl_loss") in (False, ABSENT):
        if draft.has("kl_loss_coef"):
            draft.unread("kl_loss_coef")
        if isinstance(draft.get("reference"), dict) and not penalised:
            draft.unread("reference")


def _penalty(draft: Draft) -> None:
    name = draft.get("kl_penalty")
    if isinstance(name, str) and name in _PENALTIES:
        why = "with d = log policy - log reference, ROLL's kl is d and its mse is d^2 / 2"
        draft.translate("kl_penalty", {"kl_penalty": _PENALTIES[name]}, why)
    elif name == "full":
        draft.refuse("kl_penalty", _FULL)


def _recompute(draft: Draft, keys: Keys) -> None:
    if draft.get(keys) is True:
        why = "a pass before the update computes the old log-probabilities, even for one optimizer step per rollout"
        draft.translate(keys, {"force_on_policy_ratio": False}, why)
    else:
        draft.unread(keys)


def _corrections(draft: Draft) -> None:
    """Translate importance weights between rollout and trainer, from ROLL's newer section or its older flat keys."""
    weight, filters = draft.get(_WEIGHT), draft.get(_FILTERS)
    if isinstance(weight, dict) and isinstance(weight.get("enabled", False), bool):
        if weight.get("enabled", False):
            kind, bound = weight.get("weight_type", "token"), weight.get("upper_bound", _BOUND)
            _weight(draft, _WEIGHT, bound if kind == "token" else None)
        draft.drop(_WEIGHT)
        draft.keep_unknown(_WEIGHT, weight, ("enabled", "weight_type", "upper_bound", "detach"))
    if isinstance(filters, list) and all(isinstance(item, dict) for item in filters):
        if any(item.get("enabled", False) is not False for item in filters):
            draft.refuse(_FILTERS, "tokens are not masked by ratio: use weights (is_weight)")
        draft.drop(_FILTERS)
    if draft.get("train_infer_correction") in (None, {}):
        draft.drop("train_infer_correction")
    if draft.get(_FLAT_WEIGHT) in (False, None):
        draft.drop(_FLAT_WEIGHT)
    elif draft.get(_FLAT_WEIGHT) is True:
        bound = draft.get(_FLAT_BOUND)
        draft.drop(_FLAT_BOUND)
        _weight(draft, _FLAT_WEIGHT, _BOUND if bound is ABSENT else bound)


def _weight(draft: Draft, path: str, bound: Any) -> None:
    if bound is None:
        draft.refuse(
            path, "weights are per token and bounded: write weight_type: token and upper_bound: 2.0, for example"
        )
        return
    why = "truncated importance sampling: token weights min(pi_old / pi_rollout, bound) on the loss"
    draft.translate(path, {f"{_CORRECTION}.is_weight": "token", f"{_CORRECTION}.is_cap": bound}, why)


STEPS: tuple[Step, ...] = (_critic, _advantages, _reward_clip, _clip_range, _kl, _corrections)

ROWS = (
    Row(
        "ppo_epochs pg_clip advantage_clip entropy_loss_coef use_kl_loss",
        Same(),
    ),
    Row("loss_agg_mode", Custom(_aggregation, f"the same, except `seq-mean-token-sum-norm`: {_ROLLS_NORM}")),
    Row(
        "kl_loss_coef",
        ByStep(
            "the same; no effect without `use_kl_loss`. k3 is clamped to 10, as in ROLL; log ratios to 20 first, so "
            "clamped tokens give no gradient, not NaN"
        ),
    ),
    Row(
        "adv_estimator",
        ByStep(f"`grpo`: the same; `reinforce`: see `norm_mean_type`; others: {_UNSUPPORTED_ESTIMATOR}"),
    ),
    Row(
        "norm_mean_type norm_std_type",
        ByStep(
            "with `reinforce`: `group`, `group` is `adv_estimator: grpo`; `group`, `null` adds "
            "`norm_adv_by_std_in_grpo: false`; `batch`, `null` is `reinforce`; others (`null`, `null`: no baseline) "
            "are not supported. No effect with `grpo`, as in ROLL"
        ),
    ),
    Row(
        "reward_clip",
        ByStep(
            "not supported below the largest possible reward: `(n - 1) / sqrt(n)` in groups of n under grpo, 1 for "
            "`math`; else no effect"
        ),
    ),
    Row(
        "whiten_advantages",
        Unsupported((False,), "advantages are not whitened over tokens; grpo divides by the group's deviation"),
    ),
    Row(
        (
            "whiten_rewards use_reward_scaling use_reward_norm add_len_reward reward_norm reward_shift "
            "reward_scale reward_normalize"
        ),
        Unsupported((False,), "only adv_estimator normalizes rewards"),
    ),
    Row("gamma", Unsupported((1,), "a response's reward is not discounted over tokens")),
    Row("use_pg_clip_range", ByStep("`pg_clip_low` and `pg_clip_high` apply whenever they are set")),
    Row(_SIDES, ByStep("the same; no effect without `use_pg_clip_range`, as in ROLL")),
    Row("dual_clip_loss", Custom(_dual_clip, "`true` becomes ROLL's number, 1 + 2 x `pg_clip`")),
    Row("max_grad_norm", Renamed("actor_train.training_args.max_grad_norm", "optimizer setting")),
    Row(
        "add_token_level_kl",
        Same("penalties of a token and later ones are subtracted from its normalized advantage"),
    ),
    Row("init_kl_coef", ByStep("the same; no effect without `add_token_level_kl`")),
    Row(
        "kl_penalty",
        ByStep(
            "`kl` is `k1`, `mse` is `k2`, `abs` is the same; log ratios are clamped to 20; no effect without "
            f"`add_token_level_kl`. `full`: {_FULL}"
        ),
    ),
    Row(
        "target_kl kl_horizon enable_reference",
        Unread("the section `reference` adds it, init_kl_coef is constant; no `target_kl` with `add_token_level_kl`"),
    ),
    Row(
        "reference",
        ByStep("the same; dropped without a KL term, to save its devices"),
    ),
    Row(
        "train_infer_correction",
        ByStep(
            "`is_weight` with `weight_type: token` and a bound is `rollout_correction: {is_weight: token, "
            "is_cap: ...}`; others and filters are not supported"
        ),
    ),
    Row(_FLAT_WEIGHT, ByStep("`rollout_correction` with `rollout_importance_sampling_ratio_upper_bound` as its cap")),
    Row(_MASKS, Unsupported((False,), "tokens are not masked by ratio: use weights (rollout_correction)")),
    Row(
        (_FLAT_BOUND, *_THRESHOLDS),
        Unread("read with their switch only"),
    ),
    Row(
        "max_len_mask difficulty_mask error_max_len_clip",
        Unsupported((False,), "truncated and easy samples are trained on too"),
    ),
    Row(
        "difficulty_low_threshold difficulty_high_threshold error_max_len_threshold mask_type",
        Unread("read with their mask only"),
    ),
    Row("difficulty_loss_weight length_loss_weight", Unsupported((False,), "all samples have the same weight")),
    Row("importance_sampling", Unsupported(("token",), "ratios are per token; no GSPO")),
    Row("use_policy_loss_type", Unsupported(("PPO",), _PPO)),
    Row("use_topr_loss", Unsupported((False,), _PPO)),
    Row("postive_loss_coef use_topr_neg_loss_coef", Unsupported((0,), _PPO)),
    Row("rl_loss_coef", Unsupported((1,), "scale learning_rate, kl_loss_coef and entropy_loss_coef instead")),
    Row("pg_variant <role>.pg_variant", Unsupported((), _PPO)),
    Row(
        "enable_old_logprobs_recompute",
        Custom(
            _recompute,
            "`true` is `force_on_policy_ratio: false`; `false` has no effect",
        ),
    ),
    Row("balance_length", Unread("the loss is independent of samples per rank")),
    Row(
        "force_disable_old_logprobs_recompute",
        Unsupported((False,), "old log-probabilities are those before the step's first update"),
    ),
    Row("minibatch_data_iter_num", Unsupported((1,), "write ppo_epochs for passes over the samples")),
    Row("critic_warmup", Unsupported((0,), "there is no critic")),
    Row(
        _OF_CRITIC,
        Unread("of gae's critic, not supported either"),
    ),
    Row("reward_pretrain", Unread("read for judge models only")),
    Row(
        "is_pure_opd use_opd teacher student_train student_infer pure_opd_pipeline_type",
        Unsupported((False, {}), "there is no distillation"),
    ),
    Row("opd_kl_coef", Unread("read with use_opd only")),
)
