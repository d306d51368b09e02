"""The algorithm: KL terms, clips, aggregation."""

from __future__ import annotations

from roll_r3.config.rules.table import AnyRule, Rule, unread

_KL_LOSS = ("use_kl_loss=true", "reference={}")
_KL_PENALTY = ("add_token_level_kl=true", "init_kl_coef=0.1", "reference={}")


def at_most(id: str, field: str, limit: float, why: str, usual: str, *switch: str) -> Rule:
    """Return a rule about a number without effect, or with too much, above a limit.

    Args:
        why: the consequence.
        usual: value for the fix.
        switch: overrides under which the field has an effect.
    """
    return Rule(
        id=id,
        fields=(field,),
        why=f"above {limit:g} {why}",
        fix=f"write at most {limit:g} ({usual} is usual)",
        wrong=(*switch, f"{field}={limit + 1:g}"),
        right=(*switch, f"{field}={limit:g}"),
        violates=lambda config: (getattr(config, field) or 0) > limit,
    )


RULES: tuple[AnyRule, ...] = (
    Rule(
        id="kl-needs-reference",
        fields=("reference", "use_kl_loss", "add_token_level_kl"),
        why="the KL term compares with a reference policy, but none is configured",
        fix="add a `reference` section, or switch the KL term off",
        wrong=("use_kl_loss=true",),
        right=("use_kl_loss=true", "reference={}"),
        violates=lambda c: c.reference is None and (c.use_kl_loss or c.add_token_level_kl),
    ),
    Rule(
        id="reference-unused",
        fields=("use_kl_loss", "add_token_level_kl"),
        why="a reference is configured, but no KL term uses it: it wastes devices and time",
        fix="write use_kl_loss: true, or remove the `reference` section",
        wrong=("reference={}",),
        right=("reference={}", "use_kl_loss=true"),
        violates=lambda c: c.reference is not None and not (c.use_kl_loss or c.add_token_level_kl),
        severity="warning",
    ),
    Rule(
        id="kl-weighs-nothing",
        fields=("use_kl_loss", "kl_loss_coef", "add_token_level_kl", "init_kl_coef"),
        why="a KL term with a coefficient of 0 is computed but changes nothing",
        fix="set kl_loss_coef (with use_kl_loss) or init_kl_coef (with add_token_level_kl)",
        wrong=("use_kl_loss=true", "reference={}", "kl_loss_coef=0"),
        right=("use_kl_loss=true", "reference={}"),
        violates=lambda c: (c.use_kl_loss and c.kl_loss_coef == 0) or (c.add_token_level_kl and c.init_kl_coef == 0),
        severity="warning",
    ),
    Rule(
        id="unbiased-kl-is-k3",
        fields=("kl_estimator", "use_unbiased_kl"),
        why="the gradient of the ratio times k2 is not KL(policy || reference)'s; that of the ratio times k3 is",
        fix="write kl_estimator: k3",
        wrong=(*_KL_LOSS, "kl_estimator=k2", "use_unbiased_kl=true"),
        right=(*_KL_LOSS, "use_unbiased_kl=true"),
        violates=lambda c: c.use_unbiased_kl and c.kl_estimator != "k3",
    ),
    Rule(
        id="kl-penalty-of-both-signs",
        fields=("kl_penalty", "add_token_level_kl"),
        why="in the reward only k1 has the gradient of KL(policy || reference); k2 and abs also penalise tokens less "
        "likely than under the reference, so near it they pull weakly or in another direction",
        fix="write kl_penalty: k1",
        wrong=(*_KL_PENALTY, "kl_penalty=k2"),
        right=(*_KL_PENALTY,),
        violates=lambda c: c.add_token_level_kl and c.kl_penalty != "k1",
        severity="warning",
    ),
    Rule(
        id="token-sum-meets-clipping",
        fields=("loss_agg_mode", "actor_train.training_args.max_grad_norm"),
        why="summed over tokens, the gradient grows with the length of responses, and max_grad_norm then scales every "
        "step to the same size",
        fix="write loss_agg_mode: seq-mean-token-sum-norm, which divides by loss_scale_factor",
        wrong=("loss_agg_mode=seq-mean-token-sum",),
        right=("loss_agg_mode=seq-mean-token-sum-norm",),
        violates=lambda c: c.loss_agg_mode == "seq-mean-token-sum" and c.actor_train.training_args.max_grad_norm > 0,
        severity="warning",
    ),
    Rule(
        id="clip-low-below-one",
        fields=("pg_clip_low", "pg_clip"),
        why="the ratio is clipped at 1 - this, and ratios are above 0: nothing is clipped",
        fix="write a value below 1 (0.2 is usual)",
        wrong=("pg_clip=2",),
        right=("pg_clip=0.9",),
        depends=("pg_variant",),  # cispo alone may have no lower bound
        violates=lambda c: (
            c.clip_range[0] >= 1 and c.pg_variant != "cispo" and f"the lower clip is {c.clip_range[0]:g}"
        ),
    ),
    Rule(
        id="clip-high-clips",
        fields=("pg_clip_high", "pg_clip"),
        why="the ratio is clipped at 1 + this; above 10 a token may become 11 times as likely: hardly a clip",
        fix="write at most 10 (0.28 is usual)",
        wrong=("pg_clip_high=11",),
        right=("pg_clip_high=10",),
        violates=lambda c: c.clip_range[1] > 10 and f"the upper clip is {c.clip_range[1]:g}",
    ),
    at_most("dual-clip-bounds", "dual_clip_loss", 100, "times the advantage, the bound of the loss has no effect", "3"),
    at_most("reward-clip-clips", "reward_clip", 1000, "nothing is clipped: no normalised reward is as large", "10"),
    at_most("advantage-clip-clips", "advantage_clip", 1000, "nothing is clipped: no advantage is as large", "5"),
    at_most("entropy-coef-bounded", "entropy_loss_coef", 1, "the entropy would outweigh the reward", "0.001"),
    at_most("kl-loss-coef-bounded", "kl_loss_coef", 100, "the KL loss would outweigh the reward", "0.001", *_KL_LOSS),
    at_most(
        "init-kl-coef-bounded", "init_kl_coef", 100, "the penalty would outweigh the reward", "0.001", *_KL_PENALTY
    ),
    Rule(
        id="dual-clip-above-one",
        fields=("dual_clip_loss",),
        why="the dual clip bounds the loss at this times the advantage; at most 1, it would bound unclipped ratios",
        fix="write a value above 1 (3 is usual), or null",
        wrong=("dual_clip_loss=1",),
        right=("dual_clip_loss=3",),
        violates=lambda c: c.dual_clip_loss is not None and c.dual_clip_loss <= 1,
    ),
    unread(
        "pg-clip-unread",
        "pg_clip",
        "pg_clip_low",
        lambda c: c.pg_clip_low is None or c.pg_clip_high is None,
        "leave pg_clip out: pg_clip_low and pg_clip_high set both sides",
        wrong=("pg_clip=0.1", "pg_clip_low=0.2", "pg_clip_high=0.3"),
        right=("pg_clip=0.1", "pg_clip_high=0.3"),
        depends=("pg_clip_high",),
    ),
    unread(
        "kl-loss-coef-unread",
        "kl_loss_coef",
        "use_kl_loss",
        lambda c: c.use_kl_loss,
        "write use_kl_loss: true",
        wrong=("kl_loss_coef=0.1",),
        right=("kl_loss_coef=0.1", "use_kl_loss=true", "reference={}"),
    ),
    unread(
        "init-kl-coef-unread",
        "init_kl_coef",
        "add_token_level_kl",
        lambda c: c.add_token_level_kl,
        "write add_token_level_kl: true",
        wrong=("init_kl_coef=0.1",),
        right=("init_kl_coef=0.1", "add_token_level_kl=true", "reference={}"),
    ),
    unread(
        "kl-estimator-unread",
        "kl_estimator",
        "use_kl_loss",
        lambda c: c.use_kl_loss,
        "write use_kl_loss: true, or leave kl_estimator out; the penalty of add_token_level_kl has kl_penalty",
        wrong=("kl_estimator=k2",),
        right=("kl_estimator=k2", *_KL_LOSS),
    ),
    unread(
        "unbiased-kl-unread",
        "use_unbiased_kl",
        "use_kl_loss",
        lambda c: c.use_kl_loss,
        "write use_kl_loss: true, or leave use_unbiased_kl out",
        wrong=("use_unbiased_kl=true",),
        right=("use_unbiased_kl=true", *_KL_LOSS),
    ),
    unread(
        "kl-penalty-unread",
        "kl_penalty",
        "add_token_level_kl",
        lambda c: c.add_token_level_kl,
        "write add_token_level_kl: true, or leave kl_penalty out",
        wrong=("kl_penalty=abs",),
        right=("kl_penalty=k1", *_KL_PENALTY),
    ),
    unread(
        "loss-scale-factor-unread",
        "loss_scale_factor",
        "loss_agg_mode",
        lambda c: c.loss_agg_mode == "seq-mean-token-sum-norm",
        "write loss_agg_mode: seq-mean-token-sum-norm, or leave loss_scale_factor out",
        wrong=("loss_scale_factor=1000",),
        right=("loss_scale_factor=1000", "loss_agg_mode=seq-mean-token-sum-norm"),
    ),
)
