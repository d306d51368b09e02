"""Advantages, clipping, KL terms, masks and corrections."""

from __future__ import annotations

import math
from typing import Any

from roll_r3.config.report import ABSENT
from roll_r3.config.roll_yaml.draft import Draft, is_number
from roll_r3.config.roll_yaml.rows import By, Joint, Moved, Off, Row, Same, Step, Unread
from roll_r3.config.tree import Keys

_ESTIMATORS = ("gae", "skip_obs_gae", "gigpo", "step_reinforce", "agentic_reinforce", "flowgrpo", "diffnft")
_WITH_CRITIC = ("gae", "skip_obs_gae")
_OF_CRITIC = ("critic", "critic_epochs", "value_clip", "lambd", "l2")
_UNSUPPORTED_ESTIMATOR = "there is no critic and no such estimator: write grpo, or reinforce with norm_mean_type: batch"
_NO_BASELINE = (
    "ROLL's reinforce without norm_mean_type has no baseline, and here reinforce subtracts the batch's mean: "
    "write norm_mean_type: batch, or adv_estimator: grpo"
)
_NORMALISATION = (
    "rewards are normalised by group mean and deviation, by group mean alone (norm_std_type: null) or by the batch's "
    "mean (norm_mean_type: batch, norm_std_type: null)"
)
_PENALTIES = {"kl": "k1", "mse": "k2"}
"""ROLL's names of estimates in the reward -> roll_r3's."""
_FULL = "the penalty is of sampled tokens alone, not of the whole vocabulary: write kl_penalty: kl"
_ADAPTIVE = "init_kl_coef stays what it is: no controller moves it towards a target"
_ROLLS_NORM = (
    "ROLL divides by the padded length alone, this mode by the number of responses too: give loss_scale_factor, the "
    "tokens that a response's sum is divided by, as well"
)
_BOUNDED_RULES = ("math", "exact_match")
"""Rules whose rewards lie in [0, 1]."""
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
"""ROLL's default bound of the weights."""


def _critic(draft: Draft) -> None:
    """Settings of the critic go with gae, which is what asks for it; beside any other estimator ROLL reads none."""
    estimator = draft.get("adv_estimator")
    if estimator in _WITH_CRITIC or (estimator is ABSENT and draft.is_rolls):
        for key in _OF_CRITIC:
            if draft.has(key):
                draft.refuse(key, "it belongs to gae's critic, and there is none")


def _advantages(draft: Draft) -> None:
    """ROLL's normalisation of rewards and its estimator say together what is one setting here."""
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
    for key, value in given.items():
        if value in (ABSENT, None, "None", "group"):
            draft.drop(key)
        else:
            draft.unread(key)


def _reinforce(draft: Draft, mean: Any, std: Any) -> None:
    if (mean, std) == ("group", "group"):
        why = "rewards less their group's mean, over its deviation: that is grpo"
        draft.translate("adv_estimator", {"adv_estimator": "grpo"}, why)
    elif (mean, std) == ("group", None):
        why = "rewards less their group's mean: that is grpo without the deviation"
        draft.translate("adv_estimator", {"adv_estimator": "grpo", "norm_adv_by_std_in_grpo": False}, why)
    elif (mean, std) == ("batch", None):
        draft.translate("norm_mean_type", {}, "reinforce subtracts the batch's mean by itself")
    elif (mean, std) == (None, None):
        draft.refuse("adv_estimator", _NO_BASELINE)
    else:
        for key, value in (("norm_mean_type", mean), ("norm_std_type", std)):
            if value is not None:
                draft.refuse(key, _NORMALISATION)
    draft.drop("norm_mean_type")
    draft.drop("norm_std_type")


def _reward_clip(draft: Draft) -> None:
    """A clip beyond every reward that can occur does nothing."""
    clip = draft.get("reward_clip")
    if clip in (None, 0):
        draft.drop("reward_clip")
    elif clip is not ABSENT:
        if is_number(clip) and clip >= _largest_reward(draft):
            draft.unread("reward_clip")
        else:
            reason = "rewards are not clipped (in groups of n responses grpo's never exceed (n - 1) / sqrt(n))"
            draft.refuse("reward_clip", reason)


def _largest_reward(draft: Draft) -> float:
    """The largest magnitude of a reward after ROLL's normalisation, or infinity where that is not known."""
    if draft.get("add_token_level_kl") is True:
        return math.inf  # ROLL clips the rewards of tokens, less their penalty
    size = draft.get("num_return_sequences_in_group")
    if draft.get("adv_estimator") == "grpo" and draft.get("norm_adv_by_std_in_grpo") is not False:
        return (size - 1) / math.sqrt(size) if isinstance(size, int) and size > 1 else math.inf
    rules = [draft.get(keys) for keys in draft.expand("rewards.*.reward")]
    return 1.0 if rules and all(rule in _BOUNDED_RULES for rule in rules) else math.inf


def _clip_range(draft: Draft) -> None:
    """ROLL reads pg_clip_low and pg_clip_high with use_pg_clip_range only."""
    use = draft.get("use_pg_clip_range")
    if use is True:
        missing: dict[str | Keys, Any] = {key: 0.2 for key in _SIDES if draft.get(key) is ABSENT}
        draft.translate("use_pg_clip_range", missing, "pg_clip_low and pg_clip_high count wherever they are given")
    elif use in (False, None) or (use is ABSENT and draft.is_rolls):
        draft.drop("use_pg_clip_range")
        for key in _SIDES:
            if draft.has(key):
                draft.unread(key)


def _aggregation(draft: Draft, keys: Keys) -> None:
    """A file of ROLL's means ROLL's divisor, unless it names roll_r3's."""
    if draft.is_rolls and draft.get(keys) == "seq-mean-token-sum-norm" and not draft.has("loss_scale_factor"):
        draft.refuse(keys, _ROLLS_NORM)


def _dual_clip(draft: Draft, keys: Keys) -> None:
    clip = draft.get("pg_clip")
    clip = 0.2 if clip is ABSENT else clip
    if draft.get(keys) is False:
        draft.drop(keys)
    elif draft.get(keys) is True and is_number(clip):
        why = "ROLL bounds the loss at 1 + 2 x pg_clip times the advantage; here the factor is given"
        draft.translate(keys, {keys: round(1 + 2 * clip, 6)}, why)


def _kl(draft: Draft) -> None:
    """The penalty's estimate, settings of KL terms that are off, and a reference that no KL term needs."""
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
        why = "of d = log policy - log reference, ROLL's kl is d and its mse d^2 / 2"
        draft.translate("kl_penalty", {"kl_penalty": _PENALTIES[name]}, why)
    elif name == "full":
        draft.refuse("kl_penalty", _FULL)


def _recompute(draft: Draft, keys: Keys) -> None:
    if draft.get(keys) is True:
        why = "a pass before the update gives the old log-probabilities, with one optimizer step a rollout too"
        draft.translate(keys, {"force_on_policy_ratio": False}, why)
    elif draft.get(keys) is None:
        draft.drop(keys)
    else:
        draft.unread(keys)


def _corrections(draft: Draft) -> None:
    """Weights between rollout and trainer, in ROLL's newer section and its older flat keys; filters."""
    weight, filters = draft.get(_WEIGHT), draft.get(_FILTERS)
    if isinstance(weight, dict) and isinstance(weight.get("enabled", False), bool):
        if weight.get("enabled", False):
            kind, bound = weight.get("weight_type", "token"), weight.get("upper_bound", _BOUND)
            _weight(draft, _WEIGHT, bound if kind == "token" else None)
        draft.drop(_WEIGHT)
        draft.keep_unknown(_WEIGHT, weight, ("enabled", "weight_type", "upper_bound", "detach"))
    if isinstance(filters, list) and all(isinstance(item, dict) for item in filters):
        if any(item.get("enabled", False) is not False for item in filters):
            draft.refuse(_FILTERS, "no token is masked for its ratio; weigh it (is_weight)")
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
        draft.refuse(path, "weights are per token and have a bound: weight_type: token, upper_bound: 2.0, say")
        return
    why = "token weights min(pi_old / pi_rollout, bound) on the loss: truncated importance sampling"
    draft.translate(path, {f"{_CORRECTION}.mode": "token_tis", f"{_CORRECTION}.cap": bound}, why)


STEPS: tuple[Step, ...] = (_critic, _advantages, _reward_clip, _clip_range, _kl, _corrections)

ROWS = (
    Row(
        ("ppo_epochs", "pg_clip", "advantage_clip", "entropy_loss_coef", "use_kl_loss"),
        Same(),
    ),
    Row(("loss_agg_mode",), By(_aggregation, f"the same; `seq-mean-token-sum-norm` as it is, not: {_ROLLS_NORM}")),
    Row(
        ("kl_loss_coef",),
        Joint(
            "the same; no effect without `use_kl_loss`. The estimate is k3 clamped to 10, as in ROLL; log ratios are "
            "clamped to 20 before, so that clamped tokens give no gradient instead of NaN"
        ),
    ),
    Row(
        ("adv_estimator",),
        Joint(f"`grpo` is the same. `reinforce`: see `norm_mean_type`. Others: {_UNSUPPORTED_ESTIMATOR}"),
    ),
    Row(
        ("norm_mean_type", "norm_std_type"),
        Joint(
            "with `reinforce`: `group` and `group` is `adv_estimator: grpo`; `group` and `null` is that with "
            "`norm_adv_by_std_in_grpo: false`; `batch` and `null` is `reinforce`. Both `null` (no baseline) and the "
            "rest are not supported. No effect with `grpo`, as in ROLL"
        ),
    ),
    Row(
        ("reward_clip",),
        Joint(
            "no effect where no reward can exceed it: `(n - 1) / sqrt(n)` in groups of n under grpo, 1 for math's; "
            "else not supported"
        ),
    ),
    Row(
        ("whiten_advantages",),
        Off((False,), "advantages are not whitened over tokens; grpo divides by the group's deviation"),
    ),
    Row(
        (
            "whiten_rewards",
            "use_reward_scaling",
            "use_reward_norm",
            "add_len_reward",
            "reward_norm",
            "reward_shift",
            "reward_scale",
            "reward_normalize",
        ),
        Off((False,), "rewards are taken as they are, and normalised by adv_estimator alone"),
    ),
    Row(("gamma",), Off((1,), "a response has one reward, which is not discounted over its tokens")),
    Row(("use_pg_clip_range",), Joint("`pg_clip_low`, `pg_clip_high`: they count wherever they are given")),
    Row(_SIDES, Joint("the same; no effect without `use_pg_clip_range`, as in ROLL")),
    Row(("dual_clip_loss",), By(_dual_clip, "`true` is the number that ROLL uses: 1 + 2 x `pg_clip`")),
    Row(("max_grad_norm",), Moved("actor_train.training_args.max_grad_norm", "a setting of the optimizer")),
    Row(
        ("add_token_level_kl",),
        Same("the penalty of a token and of those after it goes off its advantage, after the normalisation"),
    ),
    Row(("init_kl_coef",), Joint("the same; no effect without `add_token_level_kl`")),
    Row(
        ("kl_penalty",),
        Joint(
            "`kl` is `k1`, `mse` is `k2`, `abs` is the same; log ratios are clamped to 20 here. No effect without "
            f"`add_token_level_kl`. `full` is not supported: {_FULL}"
        ),
    ),
    Row(
        ("target_kl", "kl_horizon", "enable_reference"),
        Unread(
            "a reference is there when its section is, and nothing moves init_kl_coef. `target_kl` is not supported "
            "with `add_token_level_kl`"
        ),
    ),
    Row(
        ("reference",),
        Joint("the same; no effect where no KL term uses it: it would measure a divergence, and take devices for that"),
    ),
    Row(
        ("train_infer_correction",),
        Joint(
            "`rollout_correction: {mode: token_tis, cap: ...}` for `is_weight` with `weight_type: token` and a bound; "
            "other weights and all filters are not supported"
        ),
    ),
    Row(
        (_FLAT_WEIGHT,), Joint("`rollout_correction`, with `rollout_importance_sampling_ratio_upper_bound` for its cap")
    ),
    Row(_MASKS, Off((False,), "no token is masked for its ratio; weigh it (rollout_correction)")),
    Row(
        (_FLAT_BOUND, *_THRESHOLDS),
        Unread("they are read with their switch only"),
    ),
    Row(
        ("max_len_mask", "difficulty_mask", "error_max_len_clip"),
        Off((False,), "every sample is trained on, cut ones and easy ones too"),
    ),
    Row(
        ("difficulty_low_threshold", "difficulty_high_threshold", "error_max_len_threshold", "mask_type"),
        Unread("they are read with their mask only"),
    ),
    Row(("difficulty_loss_weight", "length_loss_weight"), Off((False,), "every sample weighs the same")),
    Row(("importance_sampling",), Off(("token",), "ratios are per token; GSPO's are not here")),
    Row(("use_policy_loss_type",), Off(("PPO",), "the loss is PPO's clipped one")),
    Row(("use_topr_loss",), Off((False,), "the loss is PPO's clipped one")),
    Row(("postive_loss_coef", "use_topr_neg_loss_coef"), Off((0,), "the loss is PPO's clipped one")),
    Row(("rl_loss_coef",), Off((1,), "scale learning_rate, kl_loss_coef and entropy_loss_coef instead")),
    Row(("pg_variant", "<role>.pg_variant"), Off((), "the loss is PPO's clipped one")),
    Row(
        ("enable_old_logprobs_recompute",),
        By(
            _recompute,
            "`force_on_policy_ratio: false` for `true`; no effect for `false`: the pass is left out where it is not "
            "needed",
        ),
    ),
    Row(("balance_length",), Unread("the loss does not depend on how samples are spread")),
    Row(
        ("force_disable_old_logprobs_recompute",),
        Off((False,), "old log-probabilities are those before the step's first update"),
    ),
    Row(("minibatch_data_iter_num",), Off((1,), "passes over the samples are ppo_epochs")),
    Row(("critic_warmup",), Off((0,), "there is no critic to wait for")),
    Row(
        _OF_CRITIC,
        Unread("they belong to the critic, which only gae uses; beside gae, which is not supported, neither are they"),
    ),
    Row(("reward_pretrain",), Unread("only models that judge start from it")),
    Row(
        ("is_pure_opd", "use_opd", "teacher", "student_train", "student_infer", "pure_opd_pipeline_type"),
        Off((False, {}), "there is no distillation"),
    ),
    Row(("opd_kl_coef",), Unread("it is read with use_opd only")),
)
