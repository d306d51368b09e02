"""Prompts and rewards."""

from __future__ import annotations

import re
from collections import Counter

from roll_r3.config.derived import changed
from roll_r3.config.pipeline import RLVRConfig
from roll_r3.config.rules.table import AnyRule, Rule, Verdict, unread

BUILT_IN_REWARDS = frozenset({"exact_match", "math"})
FUNCTION = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*")


def _no_prompts(config: RLVRConfig) -> Verdict:
    names = config.actor_train.data_args.file_name
    return not names if isinstance(names, str) else not names or "" in names


def _unknown_rewards(config: RLVRConfig) -> Verdict:
    rules = (rule.reward for rule in config.rewards.values())
    return ", ".join(repr(r) for r in rules if r not in BUILT_IN_REWARDS and not FUNCTION.fullmatch(r))


def _ambiguous_domains(config: RLVRConfig) -> Verdict:
    domains = Counter(tag for rule in config.rewards.values() for tag in rule.tag_included or ("every other domain",))
    return ", ".join(f"{tag} by {n} rules" for tag, n in domains.items() if n > 1)


def _unreachable_rewards(config: RLVRConfig) -> Verdict:
    if config.actor_train.data_args.domain is not None:
        return False
    return ", ".join(n for n, r in config.rewards.items() if r.tag_included and "default" not in r.tag_included)


_COLUMNS = tuple(f"actor_train.data_args.{name}" for name in ("prompt", "messages", "ground_truth", "domain", "id"))


_TEMPLATE_PARTS = frozenset(
    {
        "add_generation_prompt", "chat_template", "continue_final_message", "conversation", "documents", "max_length",
        "messages", "padding", "return_assistant_tokens_mask", "return_dict", "return_tensors", "tokenize",
        "tokenizer_kwargs", "tools", "truncation",
    }
)  # fmt: skip
"""Arguments of apply_chat_template passed by roll_r3, or without a plain value."""


def _clashing_arguments(config: RLVRConfig) -> Verdict:
    return ", ".join(name for name in config.actor_train.data_args.chat_template_kwargs if name in _TEMPLATE_PARTS)


def _columns_of_bundled(config: RLVRConfig) -> Verdict:
    names = config.actor_train.data_args.file_name
    bundled = all(name.startswith("bundled:") for name in ([names] if isinstance(names, str) else names))
    return ", ".join(column for column in _COLUMNS if bundled and names and changed(config, column))


RULES: tuple[AnyRule, ...] = (
    Rule(
        id="data-named",
        fields=("actor_train.data_args.file_name",),
        why="there are no prompts to train on",
        fix="name one or more .jsonl, .jsonl.gz, .json or .parquet files, or bundled:NAME",
        wrong=("actor_train.data_args={}",),
        right=("actor_train.data_args.file_name=[a.jsonl]",),
        violates=_no_prompts,
    ),
    Rule(
        id="rewards-named",
        fields=("rewards",),
        why="without a reward there is nothing to learn",
        fix="leave rewards out (exact_match), or add a rule",
        wrong=("rewards={}",),
        right=("rewards={mine: {reward: math}}",),
        violates=lambda c: not c.rewards,
    ),
    Rule(
        id="reward-known",
        fields=("rewards.*.reward",),
        why=f"a reward is one of {', '.join(sorted(BUILT_IN_REWARDS))}, or package.module:function",
        fix="write one of those",
        wrong=("rewards.default.reward=maths",),
        right=("rewards.default.reward=my_package.rewards:score",),
        violates=_unknown_rewards,
    ),
    Rule(
        id="reward-domains-once",
        fields=("rewards.*.tag_included",),
        why="every domain must have exactly one reward rule",
        fix="write a different tag_included for each rule; at most one rule may leave it out",
        wrong=("rewards={a: {reward: math}, b: {reward: math}}",),
        right=(
            "rewards={a: {reward: math, tag_included: [x]}, b: {reward: math}}",
            "actor_train.data_args={file_name: prompts.jsonl, domain: tag}",
        ),
        violates=_ambiguous_domains,
    ),
    Rule(
        id="reward-reachable",
        fields=("rewards.*.tag_included", "actor_train.data_args.domain"),
        why="without a domain column every sample has the domain `default`, so these rules score nothing",
        fix="name the column in actor_train.data_args.domain, or remove the rules",
        wrong=("rewards={a: {reward: math, tag_included: [x]}, b: {reward: math}}",),
        right=("rewards={a: {reward: math, tag_included: [default]}}",),
        violates=_unreachable_rewards,
    ),
    Rule(
        id="bundled-columns-unread",
        fields=("actor_train.data_args.file_name", *_COLUMNS),
        why="a bundled task has no columns to name: these settings have no effect",
        fix="leave them out",
        wrong=("actor_train.data_args.id=name",),
        right=("actor_train.data_args={file_name: prompts.jsonl, id: name}",),
        violates=_columns_of_bundled,
    ),
    Rule(
        id="chat-template-kwargs-free",
        fields=("actor_train.data_args.chat_template_kwargs",),
        why="these arguments are set by roll_r3, or take more than a plain value",
        fix="leave them out; the prompt comes from data_args.prompt or data_args.messages",
        wrong=("actor_train.data_args={file_name: a, chat_template_kwargs: {add_generation_prompt: false}}",),
        right=("actor_train.data_args={file_name: a, chat_template_kwargs: {enable_thinking: false}}",),
        violates=_clashing_arguments,
    ),
    unread(
        "prompt-column-unread",
        "actor_train.data_args.prompt",
        "actor_train.data_args.messages",
        lambda c: c.actor_train.data_args.messages is None,
        "leave one of the two out: `messages` replaces `prompt`",
        wrong=("actor_train.data_args={file_name: a, prompt: q, messages: m}",),
        right=("actor_train.data_args={file_name: a, messages: m}",),
    ),
)
