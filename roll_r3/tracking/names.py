"""Table of all metrics with name, unit and meaning; `MetricLog` rejects other names.

Names follow ROLL's. A name with `*` declares a family, such as one metric per reward rule. docs/metrics.md is
generated from this table:

    python -m roll_r3.tracking.names [--check]
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from roll_r3.config import generated

OUTPUT = Path("docs/metrics.md")


@dataclass(frozen=True)
class Metric:
    unit: str
    meaning: str


def _stats(prefix: str, unit: str, what: str) -> dict[str, Metric]:
    """Return the mean, the maximum and the minimum of a quantity."""
    return {f"{prefix}/{statistic}": Metric(unit, what) for statistic in ("mean", "max", "min")}


def _load(side: str, where: str) -> dict[str, Metric]:
    """Return the metrics of the experts' load on one side."""
    share = f"share of a layer's choices that fall on its {{}} expert, {where}; balanced: 1 / experts; "
    entropy = f"entropy of a layer's choices over its experts / log(experts), {where}; balanced: 1; "
    figures = {
        "max_share": Metric("share", share.format("most chosen") + "mean over MoE layers"),
        "max_share_worst": Metric("share", share.format("most chosen") + "largest of all MoE layers"),
        "min_share": Metric("share", share.format("least chosen") + "mean over MoE layers"),
        "min_share_worst": Metric("share", share.format("least chosen") + "smallest of all MoE layers"),
        "entropy": Metric("1", entropy + "mean over MoE layers"),
        "entropy_worst": Metric("1", entropy + "smallest of all MoE layers"),
        "worst_layer": Metric("layer", f"index of the layer with the smallest entropy, {where}"),
        "layer_*": Metric("1", entropy + "* is the index of the layer"),
    }
    return {f"expert_load/{side}/{name}": metric for name, metric in figures.items()}


METRICS: dict[str, Metric] = {
    **_stats("critic/score", "reward", "score by the reward rules, over the step's samples"),
    **_stats(
        "critic/rewards",
        "1",
        "score normalised by adv_estimator, minus the KL penalty of add_token_level_kl",
    ),
    **_stats("critic/advantages", "1", "advantage, over trained tokens"),
    **_stats("critic/shaped_score", "reward", "score after overlong_buffer, reward_shift and reward_scale"),
    "critic/reward_clip_frac": Metric("share", "samples with normalised reward beyond reward_clip"),
    "critic/token_reward_clip_frac": Metric(
        "share", "trained tokens with reward, after the KL penalty, beyond reward_clip"
    ),
    "critic/advantage_clip_frac": Metric("share", "trained tokens with advantage beyond advantage_clip"),
    "critic/kl": Metric(
        "nats",
        "mean k3 estimate of KL(old policy || reference) over tokens; not exactly 0 in the first step under replay, as "
        "the reference routes by itself",
    ),
    "critic/kl_clamped": Metric("share", "tokens with clamped k3: over 2.6 nats below the reference, or 11 above"),
    "critic/kl_penalty": Metric("nats", "init_kl_coef x kl_penalty, summed over a response; mean over responses"),
    "critic/kl_penalty_clamped": Metric("share", "tokens with log ratio clamped to +-20 in the penalty"),
    "critic/entropy/mean": Metric("nats", "mean policy entropy before the update, over trained tokens"),
    "critic/entropy/threshold": Metric("nats", "entropy from which a token learns, with top_entropy_quantile"),
    "critic/old_log_prob/mean": Metric("nats", "mean log-probability of sampled tokens before the update"),
    "critic/ref_log_prob/mean": Metric("nats", "mean log-probability of sampled tokens under the reference"),
    **_stats("tokens/prompt_length", "tokens", "prompt length"),
    **_stats("tokens/response_length", "tokens", "response length, including the end token"),
    "tokens/truncated_ratio": Metric("share", "samples cut at response_length"),
    "actor/max_len_mask_ratio": Metric("share", "samples kept by max_len_mask"),
    "actor/difficulty_mask_ratio": Metric("share", "samples kept by difficulty_mask"),
    "actor/final_mask_ratio": Metric("share", "samples kept by all masks of samples"),
    "actor/samples_used": Metric("samples", "samples kept by all masks of samples"),
    "actor/samples_total": Metric("samples", "samples before the masks"),
    "actor/loss": Metric("1", "minimised loss, aggregated by loss_agg_mode; mean over optimizer steps"),
    "actor/pg_loss": Metric("1", "policy-gradient term of actor/loss"),
    "actor/kl_loss": Metric("nats", "KL term of actor/loss before its coefficient, by kl_estimator and loss_agg_mode"),
    "actor/kl_clamped": Metric("share", "tokens with a clamped estimate in the KL term, hence no gradient from it"),
    "actor/entropy": Metric("nats", "mean entropy during the update, over trained tokens"),
    "actor/ratio_mean": Metric(
        "1", "mean of policy / old policy; with importance_sampling: seq, of the sample's ratio"
    ),
    "actor/ratio_max": Metric("1", "largest policy / old policy, as for the mean"),
    "actor/ratio_min": Metric("1", "smallest policy / old policy, as for the mean"),
    "actor/pg_clipfrac": Metric(
        "share",
        "tokens cut by pg_variant. ppo, dppo_tv: no policy gradient, since the ratio (the probability) left the clip "
        "range in the direction of the advantage. tis, topr, cispo: the ratio is truncated",
    ),
    "actor/ppo_ratio_clipfrac": Metric("share", "tokens with ratio outside the clip range; ppo, cispo, tis"),
    "actor/ppo_ratio_high_clipfrac": Metric("share", "tokens with ratio above the clip range; ppo, cispo, tis"),
    "actor/ppo_ratio_low_clipfrac": Metric("share", "tokens with ratio below the clip range; ppo, cispo, tis"),
    "actor/approxkl": Metric("nats", "mean of (log ratio)^2 / 2"),
    "actor/policykl": Metric("nats", "mean of log old policy - log policy"),
    "actor/is_weight_mean": Metric("1", "mean importance weight of rollout_correction, after is_cap and is_floor"),
    "actor/is_weight_clipfrac": Metric("share", "tokens with a ratio above is_cap or below is_floor"),
    "actor/lr": Metric("1", "learning rate of the last optimizer step"),
    "actor_train/grad_norm": Metric("1", "global gradient norm before clipping, mean over optimizer steps"),
    "actor_train/optimizer_steps": Metric("steps", "optimizer steps made"),
    "actor_train/skipped_steps": Metric(
        "steps",
        "optimizer steps skipped for a non-finite gradient or loss; excluded from actor/ and grad_norm",
    ),
    "training/rollout_probs_diff_mean": Metric("probability", "mean |p_trainer - p_rollout| of sampled tokens"),
    "training/rollout_probs_diff_max": Metric("probability", "largest |p_trainer - p_rollout|"),
    "training/rollout_probs_diff_std": Metric("probability", "standard deviation of |p_trainer - p_rollout|"),
    "actor/rollout_train_logprobs_abs_diff_mean": Metric("nats", "mean |log p_trainer - log p_rollout|"),
    "actor/rollout_train_logprobs_abs_diff_max": Metric("nats", "largest |log p_trainer - log p_rollout|"),
    "rollout_corr/kl": Metric("nats", "k1 estimate of KL(rollout || trainer)"),
    "rollout_corr/k3_kl": Metric("nats", "k3 estimate of KL(rollout || trainer)"),
    "rollout_corr/extreme_ratio_tau2": Metric("share", "tokens with trainer / rollout ratio above 2 or below 1/2"),
    "rollout_corr/chi2_token": Metric("1", "mean of (trainer / rollout)^2 - 1 over tokens"),
    "rollout_corr/chi2_seq": Metric(
        "1", "mean over samples of (product of trainer / rollout)^2 - 1; log ratios are clamped to +-20"
    ),
    "rollout_corr/max_seq_log_ratio": Metric("nats", "largest |log trainer - log rollout| of a whole sample"),
    "rollout_corr/ess": Metric(
        "share",
        "effective sample size (mean w)^2 / mean w^2 over tokens; w: weight by is_weight, or trainer / rollout without "
        "it",
    ),
    "rollout_corr/rejected_tokens": Metric("share", "trained tokens rejected by the filters of rollout_correction"),
    "rollout_corr/rejected_samples": Metric("share", "samples without a token left by these filters"),
    "rollout_corr/opsm_samples": Metric("share", "samples with weight 0 by opsm_delta"),
    "router_replay/coverage": Metric("share", "(trained token, MoE layer) entries replayed in the update"),
    "router_replay/agreement_native": Metric(
        "share", "replayed (token, layer) entries with the same set of experts by the live router"
    ),
    "router_replay/missing_rows": Metric("entries", "(token, layer) entries not seen by the engine"),
    "router_replay/padded_rows": Metric("entries", "(padding slot, layer) entries in the update"),
    "router_replay/bytes_per_token": Metric("bytes", "bytes of routes per token with a row"),
    "router_replay/time_share": Metric("share", "step time spent on routes by the slowest rank"),
    "router_replay/audit_equal": Metric(
        "share", "audited entries dispatched to exactly the recorded experts; must be 1"
    ),
    "router_replay/audit_entries": Metric(
        "entries", "audited (token, layer) entries; recomputation in backward counts again"
    ),
    "sampling_mask/coverage": Metric(
        "share", "trained tokens with the engine's set of kept tokens, over which log-probabilities are taken"
    ),
    "sampling_mask/mean_size": Metric("tokens", "tokens kept by top_p and top_k, mean over trained tokens"),
    "sampling_mask/mass": Metric(
        "probability",
        "probability of the kept tokens in the whole distribution of the policy, mean over trained tokens. With sets, "
        "during the update. Without, where the engine's log-probabilities are of its truncated distribution, the mean "
        "of old policy / rollout: ratios are this much too small",
    ),
    **_load("rollout", "in the replayed routes"),
    **_load("live", "by the live router, at the same tokens"),
    "rollout/filter_sampled_groups": Metric("groups", "groups judged by `filter_groups`"),
    "rollout/filter_kept_groups": Metric("groups", "such groups trained on"),
    "rollout/filter_all_right": Metric("share", "judged groups with equal scores above 0"),
    "rollout/filter_all_wrong": Metric("share", "judged groups with equal scores of 0 or less"),
    "rollout/filter_rounds": Metric("1", "prompts sampled for the step / rollout_batch_size"),
    "rollout/aborted_groups": Metric(
        "groups",
        "groups aborted, or finished too late (max_additional_running_prompts); the next step takes them first",
    ),
    "mask/final_mask_sum_eq_0": Metric("1", "1: no token is left to train on, and the update is skipped; else 0"),
    "rollout/dropped_samples": Metric("samples", "samples dropped after all retries"),
    "rollout/retries": Metric("requests", "retried requests"),
    "rollout/engine_restarts": Metric("restarts", "engine restarts since the last step"),
    "reward/overlong_ratio": Metric("share", "samples with a penalty by overlong_buffer"),
    "reward/rule/*": Metric("reward", "mean score of a reward rule, before its weight; * is its name in `rewards`"),
    "reward/failed": Metric("samples", "samples left out because their rule failed"),
    "reward/groups_without_signal": Metric("share", "groups with equal scores, hence without GRPO gradient"),
    "reward/groups_all_right": Metric("share", "such groups with score above 0"),
    "reward/groups_all_wrong": Metric("share", "such groups with score 0 or less"),
    "reward/undecided": Metric(
        "samples",
        "samples for which a judge could not decide, so that it gave 0: math-verify failed or exceeded its limits, or "
        "a verdict of `llm_judge` has no score",
    ),
    "*/critic/score/mean": Metric("reward", "as critic/score/mean, of samples of section * of `rewards`"),
    "*/tokens/response_length/mean": Metric("tokens", "mean response length in section * of `rewards`"),
    "*/tokens/response_length/max": Metric("tokens", "longest response in section * of `rewards`"),
    "*/tokens/truncated_ratio": Metric("share", "samples of section * of `rewards` cut at response_length"),
    "*/rollout/groups": Metric("groups", "groups of section * of `rewards` trained on"),
    "val/*/avg@*": Metric("reward", "evaluation: mean score of the responses; n of them per prompt"),
    "val/*/pass@*": Metric(
        "share",
        "evaluation: unbiased chance that one of k responses is right (score 1 or more), mean over prompts",
    ),
    "val/*/maj@*": Metric("share", "evaluation: prompts for which the most frequent of n final answers is right"),
    "val/*/truncated_ratio": Metric("share", "evaluation: responses cut at their longest length"),
    **_stats("val/*/response_length", "tokens", "evaluation: response length, including the end token"),
    "val/*/prompts": Metric("prompts", "evaluation: number of prompts"),
    "val/*/failed": Metric("samples", "evaluation: responses left out, dropped by the engines or without a score"),
    "time/step_total": Metric("s", "whole step"),
    "time/step_generate": Metric("s", "rollout"),
    "time/step_reward": Metric("s", "rewards and advantages"),
    "time/step_reference": Metric("s", "reference log-probabilities"),
    "time/step_old_log_probs": Metric("s", "old log-probabilities; about 0 if computed in the update"),
    "time/step_train": Metric("s", "optimizer steps"),
    "time/step_model_update": Metric("s", "transfer of weights to the engines"),
    "time/step_save": Metric("s", "waiting for checkpoints and exports since the last step; not in time/step_total"),
    "time/step_evaluation": Metric("s", "one evaluation; not in time/step_total"),
    "system/global_step": Metric("steps", "step number, from 1"),
    "system/samples": Metric("samples", "samples trained on since the start"),
    "system/tps": Metric("tokens/s", "tokens of the step, including prompts, per second of time/step_total"),
}


def declared_order(names: Iterable[str]) -> tuple[list[str], list[str]]:
    """Return the declared names in the order of the table, and the undeclared ones, both sorted within a family."""
    rows = {name: _row_of(name) for name in names}
    declared = sorted((row, name) for name, row in rows.items() if row is not None)
    return [name for _, name in declared], sorted(name for name, row in rows.items() if row is None)


@cache
def _row_of(name: str) -> int | None:
    """Return the position of a name or its family in the table; None if it is not declared."""
    entries = list(METRICS)
    if name in METRICS:
        return entries.index(name)
    return next((row for row, entry in enumerate(entries) if "*" in entry and _family(entry).fullmatch(name)), None)


@cache
def _family(entry: str) -> re.Pattern[str]:
    """Return the pattern of a family's names: each `*` stands for at least one character."""
    return re.compile(re.escape(entry).replace(r"\*", ".+"), re.DOTALL)


def metrics_page() -> str:
    """Return docs/metrics.md. Names with one unit and meaning share a line."""
    lines: dict[Metric, list[str]] = {}
    for name, metric in METRICS.items():
        lines.setdefault(metric, []).append(f"`{name}`")
    head = (
        "# Metrics\n\nGenerated by `python -m roll_r3.tracking.names`; do not edit.\n\n"
        "Written to `metrics.jsonl` (one JSON object per step, and one per evaluation) and to the trackers. A step "
        "omits names without a meaning (no reference, no replay). Non-finite numbers are `null` in `metrics.jsonl`. "
        "Brackets hold units; 1: none. A `*` stands for a name of your configuration or data.\n\n"
    )
    return head + "".join(
        f"- {', '.join(names)} ({metric.unit}): {metric.meaning}\n" for metric, names in lines.items()
    )


if __name__ == "__main__":
    sys.exit(generated.main(OUTPUT, metrics_page))
