"""Policy-gradient loss: its variant, clipping, ratios, aggregation."""

from __future__ import annotations

from typing import Any

from roll_r3.config.findings.report import ABSENT
from roll_r3.config.tree import Keys
from roll_r3.from_roll.draft import Draft, is_number
from roll_r3.from_roll.key_rows import ByStep, Custom, Row, Same, Step, Unread, Unsupported, under

_WORKER, _VARIANT = "actor_train.worker_cls", "actor_train.pg_variant"
_VARIANTS = ("ppo", "vanilla", "tis", "topr", "cispo", "kimi15")
_PARAMETERS = {
    "tis": ("tis_lower_bound", "tis_upper_bound"),
    "topr": ("topr_positive_weight", "topr_negative_weight"),
    "cispo": ("cispo_use_unified_mask",),
    "kimi15": ("kimi15_tau",),
}
"""Variant -> its parameters in ROLL, under actor_train, and here, under pg_args."""
_READ_BY_ROLL = ("topr_positive_weight", "topr_negative_weight")
"""Parameters with a field in ROLL's configuration; it drops all others."""
_CISPO = {"cispo_epsilon_low": "pg_clip_low", "cispo_epsilon_high": "pg_clip_high"}
_CISPO_DEFAULT = 0.1
_SIDES = ("pg_clip_low", "pg_clip_high")
_CLIPS = ("pg_clip", *_SIDES, "use_pg_clip_range", "dual_clip_loss")
_ALL = tuple(name for names in _PARAMETERS.values() for name in names) + tuple(_CISPO)
_ROLLS_NORM = (
    "ROLL divides by the padded length alone, roll_r3 by the number of responses too: set loss_scale_factor, the "
    "tokens to divide a response's sum by"
)


def _variant(draft: Draft) -> None:
    """Translate the variant of ROLL's policy-gradient worker, the only one to read it, and its parameters."""
    worker, variant = draft.get(_WORKER), draft.get(_VARIANT)
    if draft.is_rolls:
        draft.unread("pg_variant", empty=(None, variant))
    if not (isinstance(worker, str) and worker.endswith(".ActorPGWorker")):
        draft.unread(_VARIANT, empty=(None,))
        if draft.is_rolls:
            _unread(draft, *_ALL)
        return
    if not isinstance(variant, str) or variant not in _VARIANTS:
        draft.refuse(_WORKER, f"ROLL's worker needs pg_variant, one of {', '.join(_VARIANTS)}, and stops without")
        draft.drop(_VARIANT)
        return
    draft.drop(_WORKER)
    draft.translate(_VARIANT, {"pg_variant": variant}, "the loss is set at the top")
    draft.unread("importance_sampling", empty=(None, "token"))  # ROLL's worker has ratios of tokens alone
    if variant != "ppo":
        for key in _CLIPS:
            draft.unread(key, empty=(None, False))
    for name in _PARAMETERS.get(variant, ()):
        _parameter(draft, name, f"pg_args.{name}")
    if variant == "cispo":
        _cispo(draft)
    _unread(draft, *_ALL)


def _parameter(draft: Draft, name: str, target: str) -> None:
    path = f"actor_train.{name}"
    if draft.has(path):
        dropped = "" if name in _READ_BY_ROLL else "; ROLL's configuration drops the key, and its worker has a default"
        draft.translate(path, {target: draft.get(path)}, f"a parameter of the loss{dropped}")


def _cispo(draft: Draft) -> None:
    missing: dict[str | Keys, Any] = {}
    for name, target in _CISPO.items():
        if draft.has(f"actor_train.{name}"):
            _parameter(draft, name, target)
        else:
            missing[target] = _CISPO_DEFAULT
    if missing:
        draft.translate("pg_variant", {"pg_variant": "cispo", **missing}, "ROLL's bounds of cispo are 0.1 by default")


def _unread(draft: Draft, *names: str) -> None:
    for name in names:
        draft.unread(f"actor_train.{name}")


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


STEPS: tuple[Step, ...] = (_clip_range, _variant)
"""Clip ranges first: cispo has its own bounds in the same fields."""

ROWS = (
    Row("ppo_epochs pg_clip entropy_loss_coef", Same()),
    Row("importance_sampling", ByStep("the same; no effect with `ActorPGWorker`, as in ROLL")),
    Row(
        "pg_variant actor_train.pg_variant",
        ByStep(
            "`actor_train.pg_variant` under `worker_cls: ...ActorPGWorker` is `pg_variant`; clips of PPO have no "
            "effect on the others. No effect under the default worker, as in ROLL"
        ),
    ),
    Row(under("actor_infer", "pg_variant") + under("reference", "pg_variant"), Unread("only the trainer has a loss")),
    Row(
        under("actor_train", " ".join(name for names in _PARAMETERS.values() for name in names)),
        ByStep("`pg_args`, under the same names; ROLL itself reads the weights of topr alone"),
    ),
    Row(
        under("actor_train", " ".join(_CISPO)), ByStep("`pg_clip_low` and `pg_clip_high`; `0.1` by default with cispo")
    ),
    Row("loss_agg_mode", Custom(_aggregation, f"the same, except `seq-mean-token-sum-norm`: {_ROLLS_NORM}")),
    Row("use_pg_clip_range", ByStep("`pg_clip_low` and `pg_clip_high` apply whenever they are set")),
    Row(_SIDES, ByStep("the same; no effect without `use_pg_clip_range`, as in ROLL")),
    Row("dual_clip_loss", Custom(_dual_clip, "`true` becomes ROLL's number, 1 + 2 x `pg_clip`")),
    Row("difficulty_loss_weight length_loss_weight", Unsupported((False,), "all samples have the same weight")),
    Row("rl_loss_coef", Unsupported((1,), "scale learning_rate, kl_loss_coef and entropy_loss_coef instead")),
    Row(
        "use_topr_loss use_policy_loss_type postive_loss_coef positive_loss_coef use_topr_neg_loss_coef",
        Unread("read by no worker of ROLL; see pg_variant"),
    ),
)
