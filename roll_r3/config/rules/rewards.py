"""Reward rules: names, arguments, domains, and judges."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from urllib.parse import urlsplit

import regex

from roll_r3.config.judge_prompts import NAMED, placeholders
from roll_r3.config.pipeline import RLVRConfig
from roll_r3.config.rewards import BUILT_IN_REWARDS, JUDGE, JudgeConfig
from roll_r3.config.rules.table import AnyRule, Rule, Verdict
from roll_r3.config.secrets import is_secret, names_variable

FUNCTION = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*")

_CHOICES = {
    ("code", "reward_type"): ("all", "share"),
    ("ifeval", "reward_type"): ("strict", "loose", "soft"),
    ("multiple_choice", "reward_type"): ("boxed", "correct", "loose", "soft", "strict"),
}
"""(Rule, entry of kwargs) -> its values."""
_POSITIVE = {("code", "seconds"), ("code", "memory_mb")}
_NOT_NEGATIVE = {("ifeval", "repetition_penalty"), ("multiple_choice", "repetition_penalty")} | {
    ("multiple_choice", "response_length_penalty_coef")
}
_RESERVED = {("code", "total_seconds"): "timeout", ("math", "seconds"): "timeout"}
"""(Rule, argument filled by another field) -> the field."""


def _odd_names(config: RLVRConfig) -> Verdict:
    return ", ".join(repr(name) for name in config.rewards if not name or "." in name)


def _unknown_rewards(config: RLVRConfig) -> Verdict:
    rules = (rule.reward for rule in config.rewards.values())
    return ", ".join(repr(r) for r in rules if r not in BUILT_IN_REWARDS and not FUNCTION.fullmatch(r))


def _unreachable_rewards(config: RLVRConfig) -> Verdict:
    if config.actor_train.data_args.domain is not None:
        return False
    return ", ".join(n for n, r in config.rewards.items() if r.tag_included and "default" not in r.tag_included)


def _names_of_evaluations(config: RLVRConfig) -> Verdict:
    """Name the sections with metrics under the names of an evaluation's."""
    return len(config.rewards) > 1 and ", ".join(n for n in config.rewards if f"{n}/".startswith("val/"))


def _bad_arguments(config: RLVRConfig) -> Verdict:
    return ", ".join(text for name, rule in config.rewards.items() for text in _bad_of(name, rule.reward, rule.kwargs))


def _bad_of(name: str, reward: str, kwargs: dict[str, str | int | float | bool]) -> Iterator[str]:
    for argument, value in kwargs.items():
        place = (reward, argument)
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        wanted = ""
        if place in _CHOICES and value not in _CHOICES[place]:
            wanted = f"one of {', '.join(_CHOICES[place])}"
        elif place in _POSITIVE and not (is_number and value > 0):  # type: ignore[operator]
            wanted = "a number above 0"
        elif place in _NOT_NEGATIVE and not (is_number and value >= 0):  # type: ignore[operator]
            wanted = "a number of at least 0"
        if wanted:
            yield f"{argument} of {name} must be {wanted}, got {value!r}"
        elif place in _RESERVED:
            yield f"{argument} of {name} comes from {_RESERVED[place]}"


def _mixed_texts(config: RLVRConfig) -> Verdict:
    """Name domains with rules of both kinds of text."""
    kinds: dict[str, set[bool]] = {}
    for rule in config.rewards.values():
        for tag in rule.tag_included or ("every other domain",):
            kinds.setdefault(tag, set()).add(rule.skip_special_tokens)
    return ", ".join(tag for tag, found in kinds.items() if len(found) > 1)


def _lost_judges(config: RLVRConfig) -> Verdict:
    return ", ".join(n for n, r in config.rewards.items() if (r.reward == JUDGE) != (r.judge is not None))


def _unread_timeouts(config: RLVRConfig) -> Verdict:
    rules = config.rewards.items()
    return ", ".join(n for n, r in rules if r.reward == JUDGE and (r.timeout is not None or r.kwargs))


def _of_judges(problem: Callable[[JudgeConfig], str]) -> Callable[[RLVRConfig], Verdict]:
    """Return a verdict on every judge."""

    def verdict(config: RLVRConfig) -> Verdict:
        found = {name: problem(r.judge) for name, r in config.rewards.items() if r.judge is not None}
        return ", ".join(f"{name}: {text}" for name, text in found.items() if text)

    return verdict


def _bad_address(judge: JudgeConfig) -> str:
    try:
        parts = urlsplit(judge.base_url)
        port = parts.port
    except ValueError as error:
        return str(error)
    if parts.scheme not in ("http", "https") or not parts.hostname or port == 0:
        return "it must begin with http://HOST or https://HOST"
    if parts.username is not None or parts.password is not None:
        return "it must hold no user and no password"
    if parts.query or parts.fragment or parts.path.rstrip("/").endswith("/completions"):
        return "it must end before /chat/completions, with neither ? nor #"
    return ""


def _bad_question(judge: JudgeConfig) -> str:
    return "" if judge.prompt in NAMED or "response" in placeholders(judge.prompt) else repr(judge.prompt[:40])


def _bad_score(judge: JudgeConfig) -> str:
    if judge.score in ("yes_no", "boxed"):
        return ""
    try:
        pattern = regex.compile(judge.score)
    except regex.error as error:
        return str(error)
    return "" if pattern.groups else "it has no group"


def _key_in_body(judge: JudgeConfig) -> str:
    return ", ".join(name for name in judge.extra_body if is_secret(name, ""))


def _bad_name(judge: JudgeConfig) -> str:
    name = judge.api_key_env
    return "" if name is None or names_variable(name) else "it must be the name, not the key"


_WRONG = "rewards={a: {reward: llm_judge, judge: {base_url: %s, model: m%s}}}"
_RIGHT = (_WRONG % ("http://127.0.0.1:30000/v1", ""),)

RULES: tuple[AnyRule, ...] = (
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
        id="reward-names",
        fields=("rewards",),
        why="a metric needs the name of its section, and the path of a field ends it at a dot",
        fix="write another name, such as math_rule",
        wrong=("rewards={a.b: {reward: math}}",),
        right=("rewards={a_b: {reward: math}}",),
        violates=_odd_names,
    ),
    Rule(
        id="reward-is-no-evaluation",
        fields=("rewards",),
        why="metrics of a section begin with its name, and those of an evaluation with val/: a resumed run would take "
        "one for the other, and leave evaluations out",
        fix="give the section another name",
        wrong=("rewards={val: {reward: math}, b: {reward: math}}",),
        right=("rewards={value: {reward: math}, b: {reward: math}}",),
        violates=_names_of_evaluations,
    ),
    Rule(
        id="reward-weighs",
        fields=("rewards.*.weight",),
        why="every reward has the weight 0, so there is nothing to learn",
        fix="give one of them another weight",
        wrong=("rewards.default={reward: math, weight: 0}",),
        right=("rewards={a: {reward: math}, b: {reward: exact_match, weight: 0}}",),
        violates=lambda c: bool(c.rewards) and all(r.weight == 0 for r in c.rewards.values()),
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
        id="reward-reachable",
        fields=("rewards.*.tag_included", "actor_train.data_args.domain"),
        why="without a domain column every sample has the domain `default`, so these rules score nothing",
        fix="name the column in actor_train.data_args.domain, or remove the rules",
        wrong=("rewards={a: {reward: math, tag_included: [x]}, b: {reward: math}}",),
        right=("rewards={a: {reward: math, tag_included: [default]}}",),
        violates=_unreachable_rewards,
    ),
    Rule(
        id="reward-arguments",
        fields=("rewards.*.kwargs",),
        why="these arguments of a built-in rule are wrong",
        fix="write a value of docs/rewards.md",
        wrong=("rewards={a: {reward: code, kwargs: {reward_type: some}}}",),
        right=("rewards={a: {reward: code, kwargs: {reward_type: share}}}",),
        violates=_bad_arguments,
    ),
    Rule(
        id="reward-text-once",
        fields=("rewards.*.skip_special_tokens",),
        why="all rules of a domain read the same text",
        fix="write one value of skip_special_tokens for these domains",
        wrong=("rewards={a: {reward: math}, b: {reward: exact_match, skip_special_tokens: false}}",),
        right=("rewards={a: {reward: math}, b: {reward: exact_match}}",),
        violates=_mixed_texts,
    ),
    Rule(
        id="judge-named",
        fields=("rewards.*.judge", "rewards.*.reward"),
        why="the reward llm_judge needs a judge, and only this reward has one",
        fix="write `reward: llm_judge` and `judge: {base_url: ..., model: ...}`, or leave judge out",
        wrong=("rewards={a: {reward: llm_judge}}",),
        right=_RIGHT,
        violates=_lost_judges,
    ),
    Rule(
        id="judge-settings-own",
        fields=("rewards.*.timeout", "rewards.*.kwargs"),
        why="llm_judge reads neither timeout nor kwargs",
        fix="write judge.timeout, and other fields of judge",
        wrong=("rewards={a: {reward: llm_judge, timeout: 9, judge: {base_url: http://a/v1, model: m}}}",),
        right=("rewards={a: {reward: llm_judge, judge: {base_url: http://a/v1, model: m, timeout: 9}}}",),
        violates=_unread_timeouts,
    ),
    Rule(
        id="judge-address",
        fields=("rewards.*.judge.base_url",),
        why="the judge cannot be asked at this address",
        fix="write the address up to /chat/completions, such as http://127.0.0.1:30000/v1; name the key in api_key_env",
        wrong=(_WRONG % ("127.0.0.1:30000", ""),),
        right=_RIGHT,
        violates=_of_judges(_bad_address),
    ),
    Rule(
        id="judge-key-named",
        fields=("rewards.*.judge.api_key_env",),
        why="the configuration is printed and saved, so a key must stay in the environment",
        fix="write the name of the environment variable with the key, such as JUDGE_API_KEY",
        wrong=(_WRONG % ("http://a/v1", ", api_key_env: sk-123"),),
        right=(_WRONG % ("http://a/v1", ", api_key_env: JUDGE_API_KEY"),),
        violates=_of_judges(_bad_name),
    ),
    Rule(
        id="judge-body-has-no-key",
        fields=("rewards.*.judge.api_key_env",),
        why="the configuration is printed and saved, so extra_body must hold no key",
        fix="take it out of extra_body, and write the name of the environment variable with the key in api_key_env",
        wrong=(_WRONG % ("http://a/v1", ", extra_body: {api_key: sk-123}"),),
        right=(_WRONG % ("http://a/v1", ", extra_body: {top_k: 1}"),),
        violates=_of_judges(_key_in_body),
    ),
    Rule(
        id="judge-question",
        fields=("rewards.*.judge.prompt",),
        why=f"a question is one of {', '.join(NAMED)}, or a text with {{response}}",
        fix="write one of these names, or {response} where the response belongs",
        wrong=(_WRONG % ("http://a/v1", ", prompt: macth"),),
        right=(_WRONG % ("http://a/v1", ', prompt: "Is {response} polite? YES or NO."'),),
        violates=_of_judges(_bad_question),
    ),
    Rule(
        id="judge-score",
        fields=("rewards.*.judge.score",),
        why="the verdict is read by yes_no, boxed, or a regular expression with a group for the number",
        fix="write one of these, such as 'Score: ([0-9.]+)'",
        wrong=(_WRONG % ("http://a/v1", ", score: yesno"),),
        right=(_WRONG % ("http://a/v1", ", score: 'Score: ([0-9.]+)'"),),
        violates=_of_judges(_bad_score),
    ),
)
