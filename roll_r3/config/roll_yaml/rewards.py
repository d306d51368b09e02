"""Reward workers."""

from __future__ import annotations

from roll_r3.config.report import ABSENT
from roll_r3.config.roll_yaml.draft import Draft
from roll_r3.config.roll_yaml.rows import By, Joint, Off, Row, Step, Unread, under
from roll_r3.config.tree import Keys

WORKERS = {
    "MathRuleRewardWorker": (
        "math",
        "math-verify judges here too, but it reads the whole response, where ROLL's worker reads what follows the last "
        "</think> or blank line",
    ),
}
"""Class of ROLL's worker -> the rule here, and how the two differ."""
_FALLBACK = "math_rule"
"""The domain that ROLL gives to every tag that no reward names."""


def _no_worker(section: str) -> str:
    """The two ways out for a worker without a counterpart."""
    return (
        "write `reward: package.module:function` in its place. The function takes by name what it needs of response, "
        "ground_truth, domain, prompt, messages, row (every column: test cases, a case type), finish_reason and "
        f"num_response_tokens. Or take out all of {section}, and its rows out of the data: without worker_cls the "
        "section has no rule, and rows that stay are scored by another"
    )


def _worker(draft: Draft, keys: Keys) -> None:
    """A worker class becomes a rule; with one that has none, the whole reward goes."""
    section, worker = keys[:-1], draft.get(keys)
    if worker is None:
        draft.drop(keys)
    if not isinstance(worker, str):
        return
    known = WORKERS.get(worker.rpartition(".")[2])
    if known is None:
        draft.refuse(keys, _no_worker(".".join(map(str, section))))
        draft.drop(section)
        return
    rule, why = known
    draft.translate(keys, {(*section, "reward"): rule}, why)
    tags = draft.get((*section, "tag_included"))
    if section[1] == _FALLBACK and draft.get((*section, "reward")) == rule and tags not in (ABSENT, None, []):
        why = f"{_FALLBACK} scores every tag that no other reward names, as does a rule without tag_included here"
        draft.translate((*section, "tag_included"), {}, why)


_FILTER = "no sample is drawn again because of its reward: every response of every prompt is trained on"


def _filter(draft: Draft, keys: Keys) -> None:
    value = draft.get(keys)
    if value is None or (isinstance(value, dict) and value.get("type", "no_filter") == "no_filter"):
        draft.drop(keys)
        draft.keep_unknown(keys, value, ("type", "filter_args"))
    else:
        draft.refuse(keys, _FILTER)


STEPS: tuple[Step, ...] = ()

ROWS = (
    Row(
        under("rewards.*", "worker_cls"),
        By(
            _worker,
            "`rewards.*.reward`: `...MathRuleRewardWorker` is `math`, which reads the whole response where ROLL's "
            "worker reads what follows the last `</think>` or blank line. Other workers are not supported: write "
            "`reward: package.module:function`, which takes `response`, `ground_truth`, `prompt`, `messages` or `row` "
            "by name, or take out the section together with its rows of the data",
        ),
    ),
    Row(
        under("rewards.*", "tag_included"),
        Joint(
            "the same, values of the column `actor_train.data_args.domain`; `math_rule` loses it, since it scores "
            "every tag that no other reward names"
        ),
    ),
    Row(
        under("rewards.*", "query_filter_config", "response_filter_config"),
        By(_filter, f"not supported, unless `type: no_filter`: {_FILTER}"),
    ),
    Row(under("rewards.*", "reward_manager_config"), Off(([], {}), "rewards have no plugins")),
    Row(under("rewards.*", "system_envs"), Off(({},), "set them in the shell that starts the run")),
    Row(
        under(
            "rewards.*",
            "name",
            "model_args",
            "training_args",
            "data_args",
            "generating_args",
            "strategy_args",
            "device_mapping",
            "world_size",
            "num_gpus_per_worker",
            "infer_batch_size",
            "backend_timeout",
            "max_concurrency",
            "reward_type",
            "response_length_penalty_coef",
            "format_pattern",
            "use_local",
            "code_url",
            "judge_prompt",
            "judge_model_type",
            "judge_model_name",
            "judge_api_url",
            "judge_api_key",
        ),
        Unread(
            "rules run in processes of the driver (`reward_workers`), without a worker's settings; the math rule of "
            "ROLL does not read them either"
        ),
    ),
    Row(
        under("rewards.*", "offload_nccl", "router_replay", "use_sequence_packing", "sequence_packing_args")
        + under("rewards.*", *(f"use_dynamic_batching_in_{name}" for name in ("train", "infer")))
        + under("rewards.*", *(f"max_tokens_per_microbatch_in_{name}" for name in ("train", "infer")))
        + under("rewards.*", *(f"sequence_length_round_in_{name}" for name in ("train", "infer")))
        + under("rewards.*", "logits_in_fp32", "apply_loss_scale", "pg_variant", "mtp_training_mode", "opd_kl_coef")
        + under("rewards.*", "model_update_frequency", "topr_positive_weight", "topr_negative_weight"),
        Unread("a rule runs no model, so there is nothing to batch or to train"),
    ),
)
