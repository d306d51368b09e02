"""Policy-gradient losses: settings that a loss does not read, ratios of whole samples, bounds.

`roll_r3.config.rules.algorithm` has the rules about clips common to all losses.
"""

from __future__ import annotations

from roll_r3.config.derived import changed, forces_ratio, mini_batch_size
from roll_r3.config.pipeline import RLVRConfig
from roll_r3.config.rules.table import AnyRule, Rule, Verdict, unread

_CLIPPED = ("ppo", "cispo", "dppo_tv")
"""Losses with a clip range."""
_OF_SAMPLES = ("ppo", "tis", "topr", "cispo")
"""Losses of a ratio, which may be the sample's."""
_SIDES = ("pg_clip", "pg_clip_low", "pg_clip_high")
_CLIPS = (*_SIDES, "dual_clip_loss")
_SEQ = ("importance_sampling=seq", "loss_agg_mode=seq-mean-token-mean")
_NARROW = ("pg_clip_low=0.0003", "pg_clip_high=0.0004")
_ONE_STEP = ("actor_train.training_args.gradient_accumulation_steps=64",)

_ARGS = {
    "tis_lower_bound": ("tis", "0.1"),
    "tis_upper_bound": ("tis", "2"),
    "topr_positive_weight": ("topr", "2"),
    "topr_negative_weight": ("topr", "0.5"),
    "cispo_use_unified_mask": ("cispo", "true"),
    "kimi15_tau": ("kimi15", "0.2"),
    "dppo_max_ratio": ("dppo_tv", "10"),
}
"""Parameter in `pg_args` -> its loss, and a value for the example."""


def _args_unread(name: str, variant: str, value: str) -> Rule:
    """Return the rule about a parameter of one loss, changed under another."""
    return unread(
        f"{name.replace('_', '-')}-unread",
        f"pg_args.{name}",
        "pg_variant",
        lambda c: c.pg_variant == variant,
        f"write pg_variant: {variant}, or leave pg_args.{name} out",
        wrong=(f"pg_args.{name}={value}",),
        right=(f"pg_args.{name}={value}", f"pg_variant={variant}"),
    )


def _clips_without_range(config: RLVRConfig) -> Verdict:
    return config.pg_variant not in _CLIPPED and any(changed(config, side) for side in _SIDES)


def _is_on_policy(config: RLVRConfig) -> Verdict:
    corrects = config.pg_variant in ("cispo", "kimi15", "dppo_tv") or config.importance_sampling == "seq"
    clips = [clip for clip in _CLIPS if changed(config, clip)]
    if not (corrects or clips) or mini_batch_size(config) <= 0 or not forces_ratio(config, config.samples_per_step):
        return False
    return f"without effect: {', '.join(clips)}" if clips else True


RULES: tuple[AnyRule, ...] = (
    *(_args_unread(name, variant, value) for name, (variant, value) in _ARGS.items()),
    Rule(
        id="clip-range-unread",
        fields=(*_SIDES, "pg_variant"),
        why="this loss has no clip range, so the setting has no effect",
        fix="leave pg_clip, pg_clip_low and pg_clip_high out, or write pg_variant: ppo, cispo or dppo_tv",
        wrong=("pg_variant=tis", "pg_clip=0.1"),
        right=("pg_variant=cispo", "pg_clip=0.1"),
        violates=_clips_without_range,
    ),
    unread(
        "dual-clip-unread",
        "dual_clip_loss",
        "pg_variant",
        lambda c: c.pg_variant == "ppo",
        "leave dual_clip_loss out, or write pg_variant: ppo",
        wrong=("pg_variant=cispo", "dual_clip_loss=3"),
        right=("pg_variant=ppo", "dual_clip_loss=3"),
    ),
    Rule(
        id="sample-ratio-unread",
        fields=("importance_sampling", "pg_variant"),
        why="this loss reads no ratio that could be the sample's: vanilla has none, kimi15 and dppo_tv compare the "
        "policies token by token",
        fix="write importance_sampling: token, or pg_variant: ppo, tis, topr or cispo",
        wrong=("pg_variant=vanilla", *_SEQ),
        right=("pg_variant=cispo", *_SEQ, *_NARROW),
        violates=lambda c: c.importance_sampling == "seq" and c.pg_variant not in _OF_SAMPLES,
    ),
    Rule(
        id="sample-ratio-needs-token-mean",
        fields=("loss_agg_mode", "importance_sampling"),
        why="the ratio of a sample gets the gradient of its mean log ratio only if the sample's tokens are averaged, "
        "and samples weigh the same",
        fix="write loss_agg_mode: seq-mean-token-mean",
        wrong=("importance_sampling=seq", *_NARROW),
        right=(*_SEQ, *_NARROW),
        violates=lambda c: c.importance_sampling == "seq" and c.loss_agg_mode != "seq-mean-token-mean",
    ),
    Rule(
        id="sample-ratio-clip-is-narrow",
        fields=(*_SIDES, "importance_sampling"),
        why="a mean over tokens stays near 1, so a clip as wide as for tokens never acts (GSPO's paper: 3e-4 and 4e-4)",
        fix="write pg_clip_low: 0.0003 and pg_clip_high: 0.0004, or at most 0.01",
        wrong=(*_SEQ,),
        right=(*_SEQ, "pg_clip=0.01"),
        violates=lambda c: c.importance_sampling == "seq" and c.pg_variant in _CLIPPED and max(c.clip_range) > 0.01,
        depends=("pg_variant",),
        severity="warning",
    ),
    Rule(
        id="tis-bounds-in-order",
        fields=("pg_args.tis_lower_bound", "pg_args.tis_upper_bound"),
        why="the ratio has a lower bound above its upper bound",
        fix="write a tis_lower_bound below tis_upper_bound",
        wrong=("pg_variant=tis", "pg_args.tis_lower_bound=1.5"),
        right=("pg_variant=tis", "pg_args={tis_lower_bound: 0.5, tis_upper_bound: 1.5}"),
        depends=("pg_variant",),
        violates=lambda c: c.pg_args.tis_lower_bound > c.pg_args.tis_upper_bound,
    ),
    Rule(
        id="probability-clip-below-one",
        fields=("pg_clip_high", "pg_clip", "pg_variant"),
        why="dppo_tv clips the change of a probability, which is below 1: nothing is clipped",
        fix="write a value below 1 (0.15 is usual)",
        wrong=("pg_variant=dppo_tv", "pg_clip_high=1"),
        right=("pg_variant=dppo_tv", "pg_clip_high=0.15"),
        violates=lambda c: c.pg_variant == "dppo_tv" and c.clip_range[1] >= 1,
    ),
    Rule(
        id="ratio-is-one",
        fields=("pg_variant", "importance_sampling", "force_on_policy_ratio"),
        why="a step has one optimizer step, so the ratio is 1: no clip acts, and the gradient is that of vanilla",
        fix="nothing, or make more optimizer steps of a step (gradient_accumulation_steps, ppo_epochs)",
        wrong=("pg_variant=cispo", *_ONE_STEP),
        right=("pg_variant=cispo",),
        depends=(*_CLIPS, "actor_train.training_args"),
        violates=_is_on_policy,
        severity="note",
    ),
)
