"""Evaluation: its prompts and its sampling."""

from __future__ import annotations

from collections.abc import Callable

from roll_r3.config.derived import changed, returns_kept, vllm
from roll_r3.config.pipeline import RLVRConfig
from roll_r3.config.rules.data import BUNDLED_COLUMNS, COLUMNS, clashing_arguments, columns_of_bundled, no_prompts
from roll_r3.config.rules.rollout import VLLM_COLDEST
from roll_r3.config.rules.table import AnyRule, Rule, Verdict, unread
from roll_r3.config.sampling_settings import KEPT_LIMIT
from roll_r3.config.sections import ValidationConfig
from roll_r3.config.workers import BUNDLED_DOMAIN

_DATA, _SAMPLING = "validation.data_args", "validation.generating_args"
_PROMPTS = "validation={data_args: {file_name: 'bundled:addition_mod10'}}"
_VLLM = "actor_infer.strategy_args={strategy_name: vllm}"
_VLLM_HOTTEST = 2.0
"""Highest temperature accepted by vLLM."""
_RANDOM = ("temperature", "top_p", "top_k")


def _if_any(verdict: Callable[[RLVRConfig, ValidationConfig], Verdict]) -> Callable[[RLVRConfig], Verdict]:
    """Return a verdict on the whole configuration; without evaluation nothing is violated."""
    return lambda config: config.validation is not None and verdict(config, config.validation)


def _random_and_greedy(config: RLVRConfig, validation: ValidationConfig) -> Verdict:
    named = ", ".join(name for name in _RANDOM if changed(config, f"{_SAMPLING}.{name}"))
    return validation.val_greedy and named


def _outside_vllm(config: RLVRConfig, validation: ValidationConfig) -> Verdict:
    if vllm(config) is None or validation.val_greedy:
        return False
    return not VLLM_COLDEST <= validation.generating_args.temperature <= _VLLM_HOTTEST


def _limited_by_vllm(config: RLVRConfig, validation: ValidationConfig) -> Verdict:
    limited = vllm(config) is not None and returns_kept(config)
    return limited and not validation.val_greedy and validation.generating_args.top_k < 1


def _unreachable_rewards(config: RLVRConfig, validation: ValidationConfig) -> Verdict:
    if validation.data_args.domain is not None:
        return False
    rules = config.rewards.values()
    return bool(rules) and all(rule.tag_included and "default" not in rule.tag_included for rule in rules)


RULES: tuple[AnyRule, ...] = (
    unread(
        "evaluation-unread",
        "eval_steps",
        "validation",
        lambda c: c.validation is not None,
        "add validation: {data_args: {file_name: ...}}, or leave eval_steps out",
        wrong=("eval_steps=10",),
        right=("eval_steps=10", _PROMPTS),
    ),
    Rule(
        id="evaluation-prompts-named",
        fields=(f"{_DATA}.file_name",),
        why="there are no prompts to evaluate",
        fix="name one or more .jsonl, .jsonl.gz, .json or .parquet files, or bundled:NAME",
        wrong=("validation={data_args: {}}",),
        right=(_PROMPTS,),
        violates=_if_any(lambda _, validation: no_prompts(validation.data_args)),
    ),
    Rule(
        id="evaluation-columns-unread",
        fields=(f"{_DATA}.file_name", *(f"{_DATA}.{name}" for name in COLUMNS)),
        why=BUNDLED_COLUMNS,
        fix=f"leave them out, except {_DATA}.domain: {BUNDLED_DOMAIN}",
        wrong=("validation={data_args: {file_name: 'bundled:addition_mod10', id: name}}",),
        right=("validation={data_args: {file_name: a.jsonl, id: name}}",),
        violates=_if_any(lambda config, validation: columns_of_bundled(config, _DATA, validation.data_args)),
    ),
    Rule(
        id="evaluation-template-kwargs-free",
        fields=(f"{_DATA}.chat_template_kwargs",),
        why="these arguments are set by roll_r3, or take more than a plain value",
        fix="leave them out; the prompt comes from data_args.prompt or data_args.messages",
        wrong=("validation={data_args: {file_name: a, chat_template_kwargs: {add_generation_prompt: false}}}",),
        right=("validation={data_args: {file_name: a, chat_template_kwargs: {enable_thinking: false}}}",),
        violates=_if_any(lambda _, validation: clashing_arguments(validation.data_args)),
    ),
    unread(
        "evaluation-prompt-unread",
        f"{_DATA}.prompt",
        f"{_DATA}.messages",
        lambda c: c.validation is None or c.validation.data_args.messages is None,
        "leave one of the two out: `messages` replaces `prompt`",
        wrong=("validation={data_args: {file_name: a, prompt: q, messages: m}}",),
        right=("validation={data_args: {file_name: a, messages: m}}",),
    ),
    unread(
        "evaluation-shares-unread",
        f"{_DATA}.domain_interleave_probs",
        f"{_DATA}.file_name",
        lambda c: False,
        "leave it out: an evaluation takes every prompt once",
        wrong=("validation={data_args: {file_name: a, domain_interleave_probs: {default: 1.0}}}",),
        right=(_PROMPTS,),
    ),
    unread(
        "evaluation-mask-unread",
        f"{_SAMPLING}.sampling_mask",
        f"{_SAMPLING}.top_p",
        lambda c: False,
        "leave it out: an evaluation compares no log-probabilities",
        wrong=("validation={data_args: {file_name: a}, generating_args: {top_p: 0.9, sampling_mask: false}}",),
        right=("validation={data_args: {file_name: a}, generating_args: {top_p: 0.9}}",),
    ),
    Rule(
        id="evaluation-domains-scored",
        fields=("rewards.*.tag_included", f"{_DATA}.domain"),
        why="without a domain column every prompt of the evaluation has the domain `default`, and no rule scores it",
        fix=f"name the column in {_DATA}.domain, or remove tag_included from one rule",
        wrong=(
            "rewards={a: {reward: math, tag_included: [x]}}",
            "actor_train.data_args={file_name: a, domain: tag}",
            "validation={data_args: {file_name: b}}",
        ),
        right=(
            "rewards={a: {reward: math, tag_included: [x]}}",
            "actor_train.data_args={file_name: a, domain: tag}",
            "validation={data_args: {file_name: b, domain: tag}}",
        ),
        violates=_if_any(_unreachable_rewards),
    ),
    Rule(
        id="greedy-once",
        fields=("validation.val_n_sample", "validation.val_greedy"),
        why="greedy responses to one prompt are all the same",
        fix="write val_n_sample: 1, or val_greedy: false",
        wrong=("validation={data_args: {file_name: a}, val_greedy: true, val_n_sample: 4}",),
        right=("validation={data_args: {file_name: a}, val_greedy: true}",),
        violates=_if_any(lambda _, validation: validation.val_greedy and validation.val_n_sample > 1),
    ),
    Rule(
        id="greedy-is-not-random",
        fields=("validation.val_greedy", *(f"{_SAMPLING}.{name}" for name in _RANDOM)),
        why="with val_greedy these settings have no effect",
        fix="leave them out, or write val_greedy: false",
        wrong=("validation={data_args: {file_name: a}, val_greedy: true, generating_args: {temperature: 0.6}}",),
        right=("validation={data_args: {file_name: a}, generating_args: {temperature: 0.6}}",),
        violates=_if_any(_random_and_greedy),
    ),
    Rule(
        id="evaluation-top-k-range",
        fields=(f"{_SAMPLING}.top_k",),
        why="top_k is a number of tokens",
        fix="write -1 for all tokens, or a positive number",
        wrong=("validation={data_args: {file_name: a}, generating_args: {top_k: 0}}",),
        right=("validation={data_args: {file_name: a}, generating_args: {top_k: 20}}",),
        violates=_if_any(lambda _, v: v.generating_args.top_k < 1 and v.generating_args.top_k != -1),
    ),
    Rule(
        id="evaluation-limited-by-vllm",
        fields=(f"{_SAMPLING}.top_k", "actor_infer.generating_args.sampling_mask"),
        depends=(
            "actor_infer.strategy_args.strategy_name",
            "actor_infer.generating_args.top_p",
            "actor_infer.generating_args.top_k",
            "validation.val_greedy",
        ),
        why=f"vLLM returns kept tokens for training, so it samples every request among at most {KEPT_LIMIT:,} tokens",
        fix=f"write a top_k, such as {KEPT_LIMIT}, or actor_infer.generating_args.sampling_mask: false",
        wrong=(
            _VLLM,
            "actor_infer.generating_args={top_k: 50}",
            "validation={data_args: {file_name: a}, generating_args: {top_p: 0.9}}",
        ),
        right=(
            _VLLM,
            "actor_infer.generating_args={top_k: 50}",
            "validation={data_args: {file_name: a}, generating_args: {top_p: 0.9, top_k: 100}}",
        ),
        violates=_if_any(_limited_by_vllm),
        severity="warning",
    ),
    Rule(
        id="evaluation-temperature-of-vllm",
        fields=(f"{_SAMPLING}.temperature", "actor_infer.strategy_args.strategy_name"),
        depends=("validation.val_greedy",),
        why=f"vLLM samples at {VLLM_COLDEST} for any lower temperature, and refuses temperatures above {_VLLM_HOTTEST}",
        fix=f"write a temperature from {VLLM_COLDEST} to {_VLLM_HOTTEST}, or val_greedy: true",
        wrong=(_VLLM, "validation={data_args: {file_name: a}, generating_args: {temperature: 0.001}}"),
        right=(_VLLM, "validation={data_args: {file_name: a}, generating_args: {temperature: 0.01}}"),
        violates=_if_any(_outside_vllm),
    ),
    Rule(
        id="evaluation-stops-of-vllm",
        fields=(f"{_SAMPLING}.stop_strings", "actor_infer.strategy_args.strategy_name"),
        why="vLLM is asked for tokens without text, so it cannot find a stop string",
        fix="write stop_token_ids instead, or strategy_name: sglang",
        wrong=(_VLLM, "validation={data_args: {file_name: a}, generating_args: {stop_strings: [END]}}"),
        right=(_VLLM, "validation={data_args: {file_name: a}, generating_args: {stop_token_ids: [7]}}"),
        violates=_if_any(lambda config, v: vllm(config) is not None and bool(v.generating_args.stop_strings)),
    ),
)
