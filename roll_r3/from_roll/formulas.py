"""Formulas of ROLL's RLVR pipeline, and of a translated file: a numeric test compares each with slow loops."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Formula:
    """One formula."""

    name: str
    """Id of its cases in tests/unit/from_roll/test_roll_formulas.py."""
    keys: str
    """Keys of ROLL."""
    formula: str
    remark: str = ""
    """Difference from ROLL, if there is one."""


FORMULAS = (
    Formula(
        "norms",
        "norm_mean_type, norm_std_type",
        "R = (score - mean) / (deviation + 1e-6) over a group, or over a domain's samples of the step; the deviation "
        "has n - 1",
        "ROLL fails with the deviation of a group and another mean; a rule rejects it",
    ),
    Formula("grpo", "adv_estimator: grpo", "mean and deviation of the group"),
    Formula("reward-clip", "reward_clip", "R, and each token's reward after KL, in [-x, x]"),
    Formula(
        "kl-in-reward",
        "add_token_level_kl, kl_penalty, init_kl_coef",
        "r_t = R at the last token - coefficient x KL_t; A_t = r_t + r_(t+1) + ...",
        "log ratios are clamped to 20",
    ),
    Formula(
        "whitening",
        "whiten_advantages",
        "A = (A - mean) / sqrt(variance + 1e-8) over a domain's trained tokens; the variance has n - 1",
    ),
    Formula(
        "length-mask",
        "max_len_mask",
        "no loss on truncated responses; their scores stay in every norm",
        "ROLL also masks a response that ends in its last allowed token",
    ),
    Formula("difficulty-mask", "difficulty_mask", "no loss on groups with a mean score outside (low, high)"),
    Formula("advantage-clip", "advantage_clip", "A in [-x, x]"),
    Formula("ppo", "pg_clip, use_pg_clip_range", "-min(r A, clip(r, 1 - low, 1 + high) A), r = pi / pi_old"),
    Formula("dual-clip", "dual_clip_loss", "for A < 0 at most -(1 + 2 pg_clip) A"),
    Formula("sample-ratio", "importance_sampling: seq", "r = exp(mean of log r over the response)"),
    Formula("vanilla", "pg_variant: vanilla", "-A log pi"),
    Formula("tis", "pg_variant: tis", "-[clip(r, lower, upper)] A log pi; brackets have no gradient"),
    Formula(
        "topr",
        "pg_variant: topr",
        "-A log pi x positive weight for scores above 0, else -[min(r, 1)] A log pi x negative weight",
    ),
    Formula(
        "cispo",
        "pg_variant: cispo",
        "-[clip(r, 1 - low, 1 + high)] A log pi; the unified mask drops tokens that ppo clips",
        "ROLL's configuration cannot set the bounds, 0.1 each; here they can be set",
    ),
    Formula("kimi15", "pg_variant: kimi15", "-A log pi + tau / 2 x (log r)^2"),
    Formula(
        "is-weight",
        "train_infer_correction.is_weight",
        "the policy gradient x [min(w, bound)]; w = pi_old / pi_rollout of the token, its product over the response, "
        "or exp(mean log w)",
        "ROLL has pi_rollout only with generating_args.logprobs or asynchronous generation; else its w is 1",
    ),
    Formula(
        "filters",
        "train_infer_correction.filters",
        "no loss outside the bounds of w, or of pi_old - pi_rollout: of the token, or summed or averaged over the "
        "response",
        "filtered tokens leave every mean, as in ROLL with enable_old_logprobs_recompute; its token-mean ignores them",
    ),
    Formula(
        "aggregation",
        "loss_agg_mode",
        "token-mean; mean over responses with trained tokens of their token sum, or of their token mean",
    ),
    Formula("kl-loss", "use_kl_loss, kl_loss_coef", "coefficient x min(exp(d) - d - 1, 10), d = log pi_ref - log pi"),
)
