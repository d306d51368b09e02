"""Every metric there is: name, unit and meaning, in one place. `MetricLog` refuses a name that is not here.

ROLL's names are the base. docs/metrics.md is generated from this table.

python -m roll_r3.tracking.names [--check]
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

from roll_r3.config import generated

OUTPUT = Path("docs/metrics.md")


@dataclass(frozen=True)
class Metric:
    unit: str
    meaning: str


def _stats(prefix: str, unit: str, what: str) -> dict[str, Metric]:
    return {
        f"{prefix}/mean": Metric(unit, f"mean of {what}"),
        f"{prefix}/max": Metric(unit, f"maximum of {what}"),
        f"{prefix}/min": Metric(unit, f"minimum of {what}"),
    }


METRICS: dict[str, Metric] = {
    **_stats("critic/score", "reward", "what the reward rules gave, over the step's samples"),
    **_stats(
        "critic/rewards",
        "1",
        "a response's score as adv_estimator normalises it, less its KL penalty where add_token_level_kl is on",
    ),
    **_stats("critic/advantages", "1", "the advantage of trained tokens"),
    "critic/kl": Metric(
        "nats",
        "mean over tokens of k3's KL(old policy || reference); not quite 0 in the first step under replay, since the "
        "reference chooses its own experts",
    ),
    "critic/kl_clamped": Metric("share", "tokens whose k3 was clamped in it: further than 2.6 nats below, or 11 above"),
    "critic/kl_penalty": Metric("nats", "init_kl_coef x kl_penalty, summed over a response; mean over responses"),
    "critic/kl_penalty_clamped": Metric("share", "tokens whose log ratio was clamped to +-20 in it"),
    "critic/entropy/mean": Metric("nats", "mean entropy of the policy before the update, at trained tokens"),
    "critic/old_log_prob/mean": Metric("nats", "mean log-probability of sampled tokens before the update"),
    "critic/ref_log_prob/mean": Metric("nats", "mean log-probability of sampled tokens under the reference"),
    **_stats("tokens/prompt_length", "tokens", "prompt length"),
    **_stats("tokens/response_length", "tokens", "response length, end-of-sequence token included"),
    "tokens/truncated_ratio": Metric("share", "samples that ended because response_length was reached"),
    "actor/loss": Metric(
        "1", "the loss that an optimizer step minimises, by loss_agg_mode; mean over optimizer steps that were made"
    ),
    "actor/pg_loss": Metric("1", "the policy-gradient term of actor/loss"),
    "actor/kl_loss": Metric(
        "nats", "the KL term of actor/loss before its coefficient: kl_estimator's, by loss_agg_mode"
    ),
    "actor/kl_clamped": Metric("share", "tokens whose estimate was clamped in it; they give it no gradient"),
    "actor/entropy": Metric("nats", "entropy during the update, mean over trained tokens"),
    "actor/ratio_mean": Metric("1", "mean of policy / old policy"),
    "actor/ratio_max": Metric("1", "largest policy / old policy"),
    "actor/ratio_min": Metric("1", "smallest policy / old policy"),
    "actor/pg_clipfrac": Metric(
        "share", "tokens whose policy gradient was cut: out of the clip range on the side that their advantage pulls to"
    ),
    "actor/ppo_ratio_clipfrac": Metric("share", "tokens whose ratio is outside the clip range, on either side"),
    "actor/ppo_ratio_high_clipfrac": Metric("share", "tokens whose ratio is above it"),
    "actor/ppo_ratio_low_clipfrac": Metric("share", "tokens whose ratio is below it"),
    "actor/approxkl": Metric("nats", "mean of (log ratio)^2 / 2"),
    "actor/policykl": Metric("nats", "mean of log old policy - log policy"),
    "actor/is_weight_mean": Metric("1", "mean truncated importance weight old policy / rollout"),
    "actor/is_weight_clipfrac": Metric("share", "tokens whose weight was truncated"),
    "actor/lr": Metric("1", "learning rate of the last optimizer step"),
    "actor_train/grad_norm": Metric(
        "1", "global gradient norm before clipping, mean over optimizer steps that were made"
    ),
    "actor_train/optimizer_steps": Metric("steps", "optimizer steps that were made in this step"),
    "actor_train/skipped_steps": Metric(
        "steps",
        "optimizer steps left out because their gradient or loss was not finite; actor/ and grad_norm leave them out",
    ),
    "training/rollout_probs_diff_mean": Metric("probability", "mean |p_trainer - p_rollout| of sampled tokens"),
    "training/rollout_probs_diff_max": Metric("probability", "largest |p_trainer - p_rollout|"),
    "training/rollout_probs_diff_std": Metric("probability", "standard deviation of |p_trainer - p_rollout|"),
    "actor/rollout_train_logprobs_abs_diff_mean": Metric("nats", "mean |log p_trainer - log p_rollout|"),
    "actor/rollout_train_logprobs_abs_diff_max": Metric("nats", "largest |log p_trainer - log p_rollout|"),
    "rollout_corr/kl": Metric("nats", "k1 estimate of KL(rollout || trainer)"),
    "rollout_corr/k3_kl": Metric("nats", "k3 estimate of KL(rollout || trainer)"),
    "rollout_corr/extreme_ratio_tau2": Metric("share", "tokens whose trainer / rollout ratio is above 2 or below 1/2"),
    "router_replay/coverage": Metric("share", "(trained token, MoE layer) entries that the update replayed"),
    "router_replay/agreement_native": Metric(
        "share", "replayed (token, layer) entries where the live router would have chosen the same set of experts"
    ),
    "router_replay/missing_rows": Metric("entries", "(token, layer) entries that the engine never saw"),
    "router_replay/padded_rows": Metric("entries", "(padding slot, layer) entries in the update"),
    "router_replay/bytes_per_token": Metric("bytes", "bytes of routes held per token that has a row"),
    "router_replay/time_share": Metric("share", "of the step's time, spent by the slowest rank on routes"),
    "router_replay/audit_equal": Metric(
        "share", "audited entries whose token went to exactly the recorded experts: must be 1"
    ),
    "router_replay/audit_entries": Metric(
        "entries", "(token, layer) entries whose dispatch was audited, a recomputation in backward counted again"
    ),
    "rollout/dropped_samples": Metric("samples", "samples given up after their retries"),
    "rollout/retries": Metric("requests", "requests that were sent again"),
    "rollout/engine_restarts": Metric("restarts", "engines that were started again since the last step"),
    "reward/failed": Metric("samples", "samples left out of the step, because their rule failed to give a reward"),
    "reward/groups_without_signal": Metric(
        "share", "groups whose samples all have the same score: they have no part in GRPO's gradient"
    ),
    "reward/groups_all_right": Metric("share", "such groups whose score is above 0"),
    "reward/groups_all_wrong": Metric("share", "such groups whose score is 0 or less"),
    "reward/math_undecided": Metric(
        "samples",
        "samples that `math` scored 0, because math-verify took too long or too much memory, or failed on them",
    ),
    "time/step_total": Metric("s", "the whole step"),
    "time/step_generate": Metric("s", "rollout"),
    "time/step_reward": Metric("s", "rewards and advantages"),
    "time/step_reference": Metric("s", "reference log-probabilities"),
    "time/step_old_log_probs": Metric("s", "old log-probabilities; about 0 where the update finds them"),
    "time/step_train": Metric("s", "optimizer steps"),
    "time/step_model_update": Metric("s", "sending weights to the engines"),
    "time/step_save": Metric(
        "s", "waiting for checkpoints and exported weights since the step before; not within time/step_total"
    ),
    "system/global_step": Metric("steps", "this step, counted from 1"),
    "system/samples": Metric("samples", "samples trained on since the run began"),
    "system/tps": Metric("tokens/s", "tokens of the step, prompts included, over time/step_total"),
}


def metrics_table() -> str:
    """The whole page."""
    rows = [generated.table_row(f"`{name}`", metric.unit, metric.meaning) for name, metric in METRICS.items()]
    head = (
        "# Metrics\n\nGenerated by `python -m roll_r3.tracking.names`; do not edit.\n\n"
        "Written to `metrics.jsonl` (one JSON object a step) and TensorBoard. A name is absent from a step in which it "
        "has no meaning (no reference, no replay). What is not a finite number is `null` in `metrics.jsonl`.\n\n"
        "| name | unit | meaning |\n| --- | --- | --- |\n"
    )
    return head + "\n".join(rows) + "\n"


if __name__ == "__main__":
    sys.exit(generated.main(OUTPUT, metrics_table))
