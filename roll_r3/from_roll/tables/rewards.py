"""Reward workers."""

from __future__ import annotations

from roll_r3.config.findings.report import ABSENT
from roll_r3.config.tree import Keys
from roll_r3.from_roll.draft import Draft
from roll_r3.from_roll.key_rows import ByStep, Custom, Row, Step, Unread, Unsupported, under

WORKERS = {
    "MathRuleRewardWorker": (
        "math",
        "math-verify judges in both, but here it reads the whole response; ROLL's worker reads the text after the "
        "last </think> or blank line",
    ),
}
"""Class of ROLL's worker -> rule here, and the difference."""
_FALLBACK = "math_rule"
"""Domain in ROLL for all tags without a reward of their own."""


def _no_worker(section: str) -> str:
    """Return the two alternatives to an unsupported worker."""
    return (
        "write `reward: package.module:function` instead. The function may take, by name, response, ground_truth, "
        "domain, prompt, messages, row (every column: test cases, a case type), finish_reason and "
        f"num_response_tokens. Or remove all of {section}, and its rows from the data: without worker_cls the section "
        "has no rule, and remaining rows are scored by another one"
    )


def _worker(draft: Draft, keys: Keys) -> None:
    """Translate a worker class to a rule; remove the whole reward of an unsupported one."""
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
        why = f"{_FALLBACK} scores every tag not in another reward, like a rule without tag_included here"
        draft.translate((*section, "tag_included"), {}, why)


_FILTER = "samples are not filtered by reward: all are trained on"


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
        Custom(
            _worker,
            "`rewards.*.reward`; `...MathRuleRewardWorker` is `math`, on the whole response; ROLL's worker reads "
            "what follows the last `</think>` or blank line. For other workers write `reward: "
            "package.module:function` (of `response`, `ground_truth`, `prompt`, `messages`, `row`), or remove the "
            "section and its data",
        ),
    ),
    Row(
        under("rewards.*", "tag_included"),
        ByStep(
            "the same, values of the column `actor_train.data_args.domain`; dropped for `math_rule`, which scores "
            "all others"
        ),
    ),
    Row(
        under("rewards.*", "query_filter_config response_filter_config"),
        Custom(_filter, f"`type: no_filter` only; {_FILTER}"),
    ),
    Row(under("rewards.*", "reward_manager_config"), Unsupported(([], {}), "rewards have no plugins")),
    Row(under("rewards.*", "system_envs"), Unsupported(({},), "set them in the shell that starts the run")),
    Row(
        under(
            "rewards.*",
            "name model_args training_args data_args generating_args strategy_args device_mapping "
            "world_size num_gpus_per_worker infer_batch_size backend_timeout max_concurrency reward_type "
            "response_length_penalty_coef format_pattern use_local code_url judge_prompt judge_model_type "
            "judge_model_name judge_api_url judge_api_key",
        ),
        Unread("rules run in the driver's processes (`reward_workers`); ROLL's math rule ignores them too"),
    ),
    Row(
        under(
            "rewards.*",
            "offload_nccl router_replay use_sequence_packing sequence_packing_args use_dynamic_batching_in_train "
            "use_dynamic_batching_in_infer max_tokens_per_microbatch_in_train max_tokens_per_microbatch_in_infer "
            "sequence_length_round_in_train sequence_length_round_in_infer logits_in_fp32 apply_loss_scale pg_variant "
            "mtp_training_mode opd_kl_coef model_update_frequency topr_positive_weight topr_negative_weight",
        ),
        Unread("a rule runs no model"),
    ),
)
