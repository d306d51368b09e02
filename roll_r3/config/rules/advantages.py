"""From scores to advantages: shaping, masks of samples, norms, whitening."""

from __future__ import annotations

from roll_r3.config.derived import sampled_tokens
from roll_r3.config.pipeline import RLVRConfig
from roll_r3.config.rules.table import AnyRule, Rule, Verdict, unread

_REINFORCE = "adv_estimator=reinforce"
_PLUS_PLUS = "reinforce_plus_plus_baseline"
_MASK = "difficulty_mask=true"
_NORMS = ("adv_estimator", "norm_adv_by_std_in_grpo", "norm_mean_type", "norm_std_type")


def _has_group_baseline(c: RLVRConfig) -> bool:
    """Return true if the mean of a sample's group is subtracted."""
    return c.adv_estimator != "reinforce" or c.norm_mean_type == "group"


def _has_baseline(c: RLVRConfig) -> bool:
    """Return true if some mean of the scores is subtracted."""
    return c.adv_estimator != "reinforce" or c.norm_mean_type is not None


def _cancels_scale(c: RLVRConfig) -> bool:
    """Return true if a factor of all scores changes no advantage."""
    divides = c.adv_estimator == "grpo" and c.norm_adv_by_std_in_grpo
    divides |= c.adv_estimator == "reinforce" and c.norm_std_type is not None
    whitens = c.whiten_advantages or c.adv_estimator == _PLUS_PLUS
    return divides or (whitens and not c.add_token_level_kl and c.reward_clip is None)


def _overlong_misfit(c: RLVRConfig) -> Verdict:
    """Return the figures of a buffer longer than responses, or out of their reach."""
    buffer, longest = c.overlong_buffer, sampled_tokens(c)
    if buffer is None or c.response_length - longest < buffer.len <= c.response_length:
        return False
    start = c.response_length - buffer.len
    return f"it starts at {start} tokens, and the longest response has {longest}"


RULES: tuple[AnyRule, ...] = (
    Rule(
        id="baseline-needs-groups",
        fields=("num_return_sequences_in_group", "adv_estimator", "norm_mean_type"),
        why="the baseline is the mean of one group's responses; in a group of one, the advantage is always 0",
        fix="write num_return_sequences_in_group: 2 or more, or adv_estimator: reinforce with norm_mean_type: batch",
        wrong=("num_return_sequences_in_group=1",),
        right=("num_return_sequences_in_group=1", _REINFORCE),
        violates=lambda c: c.num_return_sequences_in_group == 1 and _has_group_baseline(c),
    ),
    Rule(
        id="group-std-needs-group-mean",
        fields=("norm_std_type", "norm_mean_type", "adv_estimator"),
        why="a group of equal scores has deviation 0; without its own mean subtracted, its rewards become a million "
        "times larger",
        fix="write norm_mean_type: group",
        wrong=(_REINFORCE, "norm_std_type=group"),
        right=(_REINFORCE, "norm_std_type=group", "norm_mean_type=group"),
        violates=lambda c: (
            c.adv_estimator == "reinforce" and c.norm_std_type == "group" and c.norm_mean_type != "group"
        ),
    ),
    Rule(
        id="batch-std-needs-mean",
        fields=("norm_std_type", "norm_mean_type", "reward_clip", "adv_estimator"),
        why="if all scores of a domain are equal, their deviation is 0; without a mean subtracted, rewards become a "
        "million times larger",
        fix="write norm_mean_type: batch, or bound the rewards with reward_clip",
        wrong=(_REINFORCE, "norm_std_type=batch", "norm_mean_type=null"),
        right=(_REINFORCE, "norm_std_type=batch", "norm_mean_type=null", "reward_clip=10"),
        violates=lambda c: (
            c.adv_estimator == "reinforce"
            and c.norm_std_type == "batch"
            and c.norm_mean_type is None
            and c.reward_clip is None
        ),
        severity="warning",
    ),
    Rule(
        id="shift-cancels",
        fields=("reward_shift", "adv_estimator", "norm_mean_type"),
        why="the mean of the scores is subtracted, and the shift with it: it changes no advantage",
        fix="leave reward_shift out; only reinforce with norm_mean_type: null has no baseline",
        wrong=("reward_shift=-0.5",),
        right=("reward_shift=-0.5", _REINFORCE, "norm_mean_type=null"),
        violates=lambda c: c.reward_shift != 0 and _has_baseline(c),
        severity="warning",
    ),
    Rule(
        id="scale-cancels",
        fields=("reward_scale", *_NORMS, "whiten_advantages", "add_token_level_kl", "reward_clip"),
        why="a deviation divides the scores, and the scale with them: it changes no advantage",
        fix="leave reward_scale out",
        wrong=("reward_scale=2",),
        right=("reward_scale=2", "norm_adv_by_std_in_grpo=false"),
        violates=lambda c: c.reward_scale != 1 and _cancels_scale(c),
        severity="warning",
    ),
    Rule(
        id="overlong-buffer-fits",
        fields=("overlong_buffer.len", "response_length", "actor_infer.generating_args.max_new_tokens"),
        why="the penalty must start within the responses",
        fix="write overlong_buffer.len: at most response_length (a fifth of it is usual), and more than "
        "response_length - max_new_tokens",
        wrong=("response_length=100", "overlong_buffer={len: 101}"),
        right=("response_length=100", "overlong_buffer={len: 100}"),
        violates=_overlong_misfit,
        depends=("overlong_buffer",),
    ),
    Rule(
        id="difficulty-thresholds-ordered",
        fields=("difficulty_low_threshold", "difficulty_high_threshold", "difficulty_mask"),
        why="no mean score is above the low and below the high threshold: nothing would train",
        fix="write a low threshold below the high one (0.1 and 0.95 are usual)",
        wrong=(_MASK, "difficulty_low_threshold=0.95", "difficulty_high_threshold=0.1"),
        right=(_MASK, "difficulty_low_threshold=0.1", "difficulty_high_threshold=0.95"),
        violates=lambda c: c.difficulty_mask and c.difficulty_low_threshold >= c.difficulty_high_threshold,
    ),
    Rule(
        id="difficulty-needs-groups",
        fields=("difficulty_mask", "num_return_sequences_in_group"),
        why="one response does not show how difficult its prompt is: its score would be the mean",
        fix="leave difficulty_mask out, or write num_return_sequences_in_group: 2 or more",
        wrong=(_MASK, "num_return_sequences_in_group=1", _REINFORCE),
        right=(_MASK,),
        violates=lambda c: c.difficulty_mask and c.num_return_sequences_in_group == 1,
    ),
    Rule(
        id="already-whitened",
        fields=("whiten_advantages", "adv_estimator", "norm_adv_by_std_in_grpo"),
        why="this estimator brings advantages to mean 0 and variance 1 itself; whitening only adds the lengths of "
        "responses to it",
        fix="leave whiten_advantages out; with reinforce, or without a division by the deviation, it has an effect",
        wrong=("whiten_advantages=true",),
        right=("whiten_advantages=true", _REINFORCE),
        violates=lambda c: (
            c.whiten_advantages
            and (c.adv_estimator == _PLUS_PLUS or (c.adv_estimator == "grpo" and c.norm_adv_by_std_in_grpo))
        ),
        severity="note",
    ),
    *(
        unread(
            f"{field.replace('_', '-')}-unread",
            field,
            "adv_estimator",
            lambda c: c.adv_estimator == "reinforce",
            f"leave {field} out, or write adv_estimator: reinforce; the other estimators have norms of their own",
            wrong=(f"{field}=group",),
            right=(_REINFORCE, "norm_mean_type=group", f"{field}=group"),
        )
        for field in ("norm_mean_type", "norm_std_type")
    ),
    *(
        unread(
            f"{field.replace('_', '-')}-unread",
            field,
            "difficulty_mask",
            lambda c: c.difficulty_mask,
            f"write difficulty_mask: true, or leave {field} out",
            wrong=(f"{field}=0.5",),
            right=(_MASK, f"{field}=0.5"),
        )
        for field in ("difficulty_low_threshold", "difficulty_high_threshold")
    ),
    unread(
        "group-std-unread",
        "norm_adv_by_std_in_grpo",
        "adv_estimator",
        lambda c: c.adv_estimator == "grpo",
        "leave norm_adv_by_std_in_grpo out, or write adv_estimator: grpo",
        wrong=("norm_adv_by_std_in_grpo=false", _REINFORCE),
        right=("norm_adv_by_std_in_grpo=false",),
    ),
)
