"""Reward workers, their settings, and filters of groups by their scores."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from roll_r3.config.findings.report import ABSENT
from roll_r3.config.tree import Keys, dotted
from roll_r3.from_roll.draft import Draft, is_number
from roll_r3.from_roll.key_rows import ByStep, Custom, Row, Step, Unread, Unsupported, under

_FALLBACK = "math_rule"
"""Domain in ROLL for all tags without a reward of their own."""
_REPETITION = {"repetition_penalty": 0.5}
"""ROLL's worker adds a penalty of repeated trigrams, down to -0.5."""
_KEY_VARIABLE = "JUDGE_API_KEY"
_LOCAL_JUDGE = "http://127.0.0.1:30000/v1"
"""Address of a server on the driver's node, with SGLang's default port."""
_JUDGE_FIELDS = {"max_new_tokens": "max_tokens", "temperature": "temperature"}
_JUDGE_EXTRAS = ("top_p", "top_k")
"""Sampling settings of a judge's request, read by SGLang and vLLM."""
_FILTER = "filter_groups"
_NO_MAXIMUM = 1.0e9
_BOUND = "sampling for a step ends after max_num_gen_batches, in ROLL never"

Made = dict[str, Any]
"""Fields of a reward here."""


@dataclass(frozen=True)
class Worker:
    """Worker of ROLL with a rule here."""

    rule: str
    difference: str
    """Difference between both, as text for a note."""
    arguments: Callable[[Made], Made] = lambda section: {}
    """Return `kwargs` of the rule, given ROLL's section."""


def _multiple_choice(section: Made) -> Made:
    coefficient = section.get("response_length_penalty_coef")
    penalty = {"response_length_penalty_coef": coefficient} if is_number(coefficient) and coefficient else {}
    kind = section.get("reward_type")
    return ({} if kind is None else {"reward_type": kind}) | _REPETITION | penalty


WORKERS = {
    "MathRuleRewardWorker": Worker(
        "math",
        "math-verify judges in both, but here it reads the whole response; ROLL's worker reads the text after the "
        "last </think> or blank line",
    ),
    "GeneralRuleRewardWorker": Worker(
        "ifeval", "instructions of IFEval, and ROLL's penalty of repetition", lambda section: _REPETITION
    ),
    "CrossThinkQARuleRewardWorker": Worker(
        "multiple_choice", "the choice, ROLL's type of reward, and its penalties", _multiple_choice
    ),
    "MultipleChoiceBoxedRuleRewardWorker": Worker(
        "multiple_choice", "1 for the boxed choice; ROLL's worker returns this as a score, and trains on 0"
    ),
    "GeneralValRuleRewardWorker": Worker(
        "multiple_choice", "1 for the choice, boxed or not", lambda section: {"reward_type": "correct"}
    ),
    "CodeSandboxRewardWorker": Worker("code", "tests of the row run in a child process with limits"),
}
"""Class of ROLL's worker -> rule here. The judge is apart: it has settings of its own."""
_JUDGE = "LLMJudgeRewardWorker"
_OWN_MODEL = ("inference", "cluster")
"""Kinds of judges with a model in the run."""
_IMAGES = ("DetectionRewardWorker", "VideoR1RewardWorker")
_OF_JUDGE = ("judge_prompt", "judge_model_type", "judge_model_name", "judge_api_url", "judge_api_key")
_OF_WORKERS = ("reward_type", "response_length_penalty_coef", "use_local", "code_url", *_OF_JUDGE)
"""Settings read by some worker of ROLL."""


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
    name, settings = worker.rpartition(".")[2], draft.get(section)
    if why := _why_not(name, settings, dotted(section)):
        draft.refuse(keys, why)
        draft.drop(section)
        return
    if name == _JUDGE:
        _judge(draft, section, keys)
    else:
        known = WORKERS[name]
        wanted: dict[str | Keys, Any] = {(*section, "reward"): known.rule}
        if arguments := known.arguments(settings):
            wanted[(*section, "kwargs")] = arguments
        draft.translate(keys, wanted, known.difference)
    for key in _OF_WORKERS:
        draft.unread((*section, key), empty=(None, True) if key == "use_local" else (None, *_used(name, key, settings)))
    _fallback(draft, section, keys)


def _used(name: str, key: str, settings: Made) -> tuple[object, ...]:
    """Return the value of a setting translated with its worker, to drop without a word."""
    translated = {
        "CrossThinkQARuleRewardWorker": ("reward_type", "response_length_penalty_coef"),
        _JUDGE: _OF_JUDGE,
    }
    return (settings.get(key),) if key in translated.get(name, ()) else (0,)


def _why_not(name: str, settings: Made, section: str) -> str:
    """Return why a worker is not supported; empty if it is."""
    if name in _IMAGES:
        return f"prompts are text: no images, no video; remove all of {section}, and its rows from the data"
    if name == "CodeSandboxRewardWorker" and settings.get("use_local") is False:
        return "there is no remote sandbox: write use_local: true, and tests run in a child process with limits"
    if name == _JUDGE:
        known = settings.get("judge_model_type") in ("api", *_OWN_MODEL)
        return "" if known else "write judge_model_type: api, and judge_api_url and judge_model_name of an endpoint"
    return "" if name in WORKERS else _no_worker(section)


def _judge(draft: Draft, section: Keys, keys: Keys) -> None:
    """Translate a judge to an endpoint: its own, or one to start for a judge with a model of its own."""
    given = draft.get(section)
    judge: Made = {"score": "yes_no"}
    if given.get("judge_prompt"):
        judge["prompt"] = given["judge_prompt"]
    if given["judge_model_type"] == "api":
        judge |= {"base_url": _base_of(given.get("judge_api_url")), "model": given.get("judge_model_name")}
        judge["api_key_env"] = _KEY_VARIABLE
        _take_key(draft, section)
        why, fix = "the judge is any endpoint with OpenAI's interface; its key is an environment variable", ""
    else:
        model = _of(given.get("model_args"), "model_name_or_path")
        sampling = given.get("generating_args")
        judge |= {"base_url": _LOCAL_JUDGE, "model": model}
        judge |= {ours: _of(sampling, key) for key, ours in _JUDGE_FIELDS.items() if _of(sampling, key) is not None}
        if extras := {key: _of(sampling, key) for key in _JUDGE_EXTRAS if _of(sampling, key) is not None}:
            judge["extra_body"] = extras
        _drop_read(draft, (*section, "model_args"), ("model_name_or_path",))
        _drop_read(draft, (*section, "generating_args"), (*_JUDGE_FIELDS, *_JUDGE_EXTRAS))
        why = "a judge with a model of its own is a server that you start, not a worker of the run"
        fix = (
            f"before the run: `python -m sglang.launch_server --model-path {model}`, with GPUs of its own; for another "
            f"place write {dotted(section)}.judge.base_url"
        )
    draft.translate(
        keys, {(*section, "reward"): "llm_judge", (*section, "judge"): judge}, why, fix=fix, warns=bool(fix)
    )


def _drop_read(draft: Draft, section: Keys, read: tuple[str, ...]) -> None:
    """Remove a section; list its keys as without effect, except for those in `read`."""
    given = draft.get(section)
    for key in list(given) if isinstance(given, dict) else []:
        if key not in read:
            draft.unread((*section, key))
    draft.drop(section)


def _base_of(url: object) -> object:
    """Return an endpoint's address without the path of chat requests, included in ROLL's files."""
    return url.removesuffix("/").removesuffix("/chat/completions") if isinstance(url, str) else url


def _of(section: object, key: str) -> Any:
    return section.get(key) if isinstance(section, dict) else None


def _take_key(draft: Draft, section: Keys) -> None:
    path = (*section, "judge_api_key")
    if draft.has(path):
        why = "a report shows no environment variable, and a saved configuration hides keys"
        draft.translate(path, {("system_envs", _KEY_VARIABLE): draft.get(path)}, why)


def _fallback(draft: Draft, section: Keys, keys: Keys) -> None:
    """Give the fallback all other tags, and a reward without tags the domain with its own name, as ROLL does."""
    tags = draft.get((*section, "tag_included"))
    if section[1] == _FALLBACK and draft.has((*section, "reward")) and tags not in (ABSENT, None, []):
        why = f"{_FALLBACK} scores every tag not in another reward, like a rule without tag_included here"
        draft.translate((*section, "tag_included"), {}, why)
    elif section[1] != _FALLBACK and tags in (ABSENT, None, []) and draft.is_rolls and len(draft.get("rewards")) > 1:
        draft.put((*section, "tag_included"), [section[1]], keys)


def _filter(draft: Draft, keys: Keys) -> None:
    """Translate a filter of prompts by their scores."""
    value = draft.get(keys)
    kind = _of(value, "type")
    given = (_of(value, "filter_args") or {}) if isinstance(value, dict) else {}
    if value is None or (isinstance(value, dict) and kind in (None, "no_filter")) or _keeps_all(draft, kind, given):
        draft.drop(keys)
        draft.keep_unknown(keys, value, ("type", "filter_args"))
    elif not isinstance(given, dict):
        draft.refuse(keys, "write filter_args as a section of numbers")
    elif kind == "std_filter":
        made = {"enable": True, "kind": "std", "low": given["std_threshold"]}
        draft.translate(keys, {(*keys[:-1], _FILTER): made}, f"groups with more deviation are trained on; {_BOUND}")
    elif kind == "mean_filter":
        low, high = given.get("threshold_down", -1), given.get("threshold_up", _NO_MAXIMUM)
        made = {"enable": True, "kind": "mean", "low": low, "high": high}
        draft.translate(keys, {(*keys[:-1], _FILTER): made}, f"groups with a mean between are trained on; {_BOUND}")
    else:
        draft.refuse(keys, "write type: mean_filter or std_filter")


def _keeps_all(draft: Draft, kind: object, given: object) -> bool:
    """Return true if ROLL's filter keeps every group."""
    if kind not in ("mean_filter", "std_filter") or not isinstance(given, dict):
        return False
    alone = draft.is_rolls and draft.get("num_return_sequences_in_group") in (ABSENT, 1)
    return alone or (kind == "std_filter" and given.get("std_threshold", -1) == -1)


STEPS: tuple[Step, ...] = ()

_PAGE = "; ".join(f"`...{name}` is `{worker.rule}`: {worker.difference}" for name, worker in WORKERS.items())

ROWS = (
    Row(
        under("rewards.*", "query_filter_config"),
        Custom(
            _filter, f"`filter_groups` of the reward: `std_filter` is `kind: std`, `mean_filter` `kind: mean`; {_BOUND}"
        ),
    ),
    Row(
        under("rewards.*", "worker_cls"),
        Custom(
            _worker,
            f"`rewards.*.reward`. {_PAGE}. `...LLMJudgeRewardWorker` is `llm_judge` with an endpoint in `judge`; for a "
            "judge with its own model, `judge_model_type: inference`, start a server. For other workers write "
            "`reward: package.module:function` (of `response`, `ground_truth`, `prompt`, `messages`, `row`), or remove "
            "the section and its data",
        ),
    ),
    Row(
        under("rewards.*", "tag_included"),
        ByStep(
            "the same, values of the column `actor_train.data_args.domain`; dropped for `math_rule`, which scores "
            "all others; among several rewards one without tags has its own name"
        ),
    ),
    Row(under("rewards.*", "response_filter_config"), Unsupported(({}, {"type": "no_filter"}), "groups are whole")),
    Row(under("rewards.*", "reward_manager_config"), Unsupported(([], {}), "rewards have no plugins")),
    Row(
        under("rewards.*", " ".join(_OF_WORKERS)),
        ByStep("read with their worker, as `kwargs` or `judge`; `judge_api_key` becomes `system_envs.JUDGE_API_KEY`"),
    ),
    Row(
        under(
            "rewards.*",
            "name model_args training_args data_args generating_args strategy_args device_mapping "
            "world_size num_gpus_per_worker infer_batch_size backend_timeout max_concurrency format_pattern",
        ),
        Unread("rules run in the driver's processes (`reward_workers`)"),
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
