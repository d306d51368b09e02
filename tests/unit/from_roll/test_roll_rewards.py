"""Reward workers of ROLL: their rules here, judges, filters, and messages about others."""

from __future__ import annotations

from typing import Any

import pytest

from roll_r3.config.findings.report import ABSENT, Origins, render
from roll_r3.from_roll.translate import translate
from roll_r3.rewards.functions import OFFERED
from tests.unit.from_roll.cases import MATH, at, of_roll, run

WORKERS = "roll.pipeline.rlvr.rewards"


def reward(name: str, worker: str, **settings: Any) -> dict[str, Any]:
    """Return a file of ROLL with a second reward."""
    return of_roll(**{f"rewards__{name}": {"worker_cls": f"{WORKERS}.{worker}", "tag_included": [name], **settings}})


def test_the_way_out_names_all_that_a_function_may_take_and_all_that_must_go() -> None:
    _, _, findings = translate(of_roll(rewards__judge__worker_cls="my.OwnRewardWorker"), {})
    (finding,) = [each for each in findings if each.rule == "roll-unsupported"]
    assert all(name in finding.fix for name in OFFERED)
    assert "remove all of rewards.judge, and its rows" in finding.fix


@pytest.mark.parametrize(
    ("worker", "settings", "expected"),
    [
        (
            "GeneralRuleRewardWorker",
            {"reward_type": "soft"},
            {"reward": "ifeval", "kwargs": {"repetition_penalty": 0.5}},
        ),
        (
            "CrossThinkQARuleRewardWorker",
            {"reward_type": "soft", "response_length_penalty_coef": 0.0},
            {"reward": "multiple_choice", "kwargs": {"reward_type": "soft", "repetition_penalty": 0.5}},
        ),
        (
            "CrossThinkQARuleRewardWorker",
            {"response_length_penalty_coef": 0.1},
            {
                "reward": "multiple_choice",
                "kwargs": {"repetition_penalty": 0.5, "response_length_penalty_coef": 0.1},
            },
        ),
        ("MultipleChoiceBoxedRuleRewardWorker", {}, {"reward": "multiple_choice"}),
        ("GeneralValRuleRewardWorker", {}, {"reward": "multiple_choice", "kwargs": {"reward_type": "correct"}}),
        ("CodeSandboxRewardWorker", {"use_local": True, "code_url": None}, {"reward": "code"}),
        (
            "LLMJudgeRewardWorker",
            {
                "judge_model_type": "api",
                "judge_api_url": "https://judge/v1/chat/completions",
                "judge_model_name": "j",
                "judge_prompt": "Qwen2.5-7B-Instruct-RLVR-prompt",
            },
            {
                "reward": "llm_judge",
                "judge": {
                    "base_url": "https://judge/v1",
                    "model": "j",
                    "api_key_env": "JUDGE_API_KEY",
                    "prompt": "Qwen2.5-7B-Instruct-RLVR-prompt",
                    "score": "yes_no",
                },
            },
        ),
        (
            "LLMJudgeRewardWorker",
            {
                "judge_model_type": "inference",
                "model_args": {"model_name_or_path": "some/judge"},
                "generating_args": {"max_new_tokens": 100, "temperature": 0.8, "top_p": 0.8, "num_beams": 1},
                "strategy_args": {"strategy_name": "vllm"},
            },
            {
                "reward": "llm_judge",
                "judge": {
                    "base_url": "http://127.0.0.1:30000/v1",
                    "model": "some/judge",
                    "max_tokens": 100,
                    "temperature": 0.8,
                    "extra_body": {"top_p": 0.8},
                    "score": "yes_no",
                },
            },
        ),
    ],
)
def test_a_worker_becomes_a_rule(worker, settings, expected):
    translated, named = run(reward("other", worker, **settings))
    assert at(translated, "rewards.other") == {**expected, "tag_included": ["other"]}
    assert "roll-unsupported" not in named


def test_a_judge_with_a_model_of_its_own_warns_of_the_server_to_start():
    data = reward("other", "LLMJudgeRewardWorker", judge_model_type="inference", model_args={"model_name_or_path": "m"})
    (finding,) = [f for f in translate(data, {})[2] if f.path == "rewards.other.worker_cls"]
    assert finding.severity == "warning"
    assert "sglang.launch_server --model-path m" in finding.fix
    assert "rewards.other.judge.base_url" in finding.fix


@pytest.mark.parametrize(
    ("worker", "settings"),
    [
        ("CodeSandboxRewardWorker", {"use_local": False, "code_url": "http://sandbox"}),
        ("LLMJudgeRewardWorker", {}),
        ("DetectionRewardWorker", {}),
        ("VideoR1RewardWorker", {}),
    ],
)
def test_a_worker_without_a_rule_goes_as_a_whole(worker, settings):
    translated, named = run(reward("other", worker, **settings))
    assert "rewards.other.worker_cls" in named["roll-unsupported"]
    assert "other" not in translated["rewards"]


def test_a_key_of_a_judge_is_a_variable_and_shows_nowhere():
    data = reward("other", "LLMJudgeRewardWorker", judge_model_type="api", judge_api_key="hush", judge_api_url="u")
    translated, _, findings = translate(data, {})
    assert translated["system_envs"] == {"JUDGE_API_KEY": "hush"}
    assert "hush" not in render(findings, Origins("f.yaml", {}))


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"type": "std_filter", "filter_args": {"std_threshold": 0}}, {"enable": True, "kind": "std", "low": 0}),
        (
            {"type": "mean_filter", "filter_args": {"threshold_up": 0.9, "threshold_down": 0.1}},
            {"enable": True, "kind": "mean", "low": 0.1, "high": 0.9},
        ),
        ({"type": "mean_filter"}, {"enable": True, "kind": "mean", "low": -1, "high": 1.0e9}),
        ({"type": "std_filter", "filter_args": {}}, ABSENT),
        ({"type": "no_filter", "filter_args": {"std_threshold": 0}}, ABSENT),
        (None, ABSENT),
    ],
)
def test_a_filter_of_prompts_is_one_of_groups(given, expected):
    translated, named = run(of_roll(rewards__math_rule__query_filter_config=given))
    assert at(translated, "rewards.math_rule.filter_groups") == expected
    assert "query_filter_config" not in translated["rewards"]["math_rule"]
    assert "roll-unsupported" not in named
    alone = of_roll(rewards__math_rule__query_filter_config=given, num_return_sequences_in_group=1)
    assert at(run(alone)[0], "rewards.math_rule.filter_groups") is ABSENT


def test_an_unknown_filter_is_refused():
    for given in ({"type": "my_filter"}, {"type": "std_filter", "filter_args": 3}):
        _, named = run(of_roll(rewards__math_rule__query_filter_config=given))
        assert "rewards.math_rule.query_filter_config" in named["roll-unsupported"]


def test_rewards_without_tags_are_reached_by_a_column_with_their_names():
    translated, _ = run(of_roll(rewards__other={"worker_cls": MATH}))
    assert at(translated, "rewards.other.tag_included") == ["other"]
    assert at(translated, "rewards.math_rule.tag_included") is ABSENT
    assert at(translated, "actor_train.data_args.domain") == "domain"
    alone, _ = run(of_roll(rewards={"other": {"worker_cls": MATH}}))
    assert at(alone, "rewards.other") == {"reward": "math"}
    assert at(alone, "actor_train.data_args.domain") is ABSENT
