"""KL terms, old log-probabilities, and the rest of the algorithm."""

from __future__ import annotations

from roll_r3.config.findings.report import ABSENT
from roll_r3.config.tree import Keys
from roll_r3.from_roll.draft import Draft
from roll_r3.from_roll.key_rows import ByStep, Custom, Renamed, Row, Same, Step, Unread, Unsupported

_PENALTIES = {"kl": "k1", "mse": "k2"}
"""ROLL's names of KL estimates in the reward -> roll_r3's."""
_FULL = "only sampled tokens are penalized, not the whole vocabulary: write kl_penalty: kl"
_ADAPTIVE = "init_kl_coef is constant: there is no adaptive controller"


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


STEPS: tuple[Step, ...] = (_kl,)

ROWS = (
    Row("use_kl_loss", Same()),
    Row(
        "kl_loss_coef",
        ByStep(
            "the same; no effect without `use_kl_loss`. k3 is clamped to 10, as in ROLL; log ratios to 20 first, so "
            "clamped tokens give no gradient, not NaN"
        ),
    ),
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
    Row("reward_pretrain", Unread("the model of a judge, through `${reward_pretrain}`")),
    Row(
        "is_pure_opd use_opd teacher student_train student_infer pure_opd_pipeline_type",
        Unsupported((False, {}), "there is no distillation"),
    ),
    Row("opd_kl_coef", Unread("read with use_opd only")),
)
