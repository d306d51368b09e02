"""Findings about wrong names and values: all at once, with places and fixes."""

from __future__ import annotations

import json
import re

import pytest

from roll_r3.config.findings.report import (
    ABSENT,
    MAX_FINDINGS,
    MORE,
    Finding,
    InvalidConfigError,
    Origins,
    as_json,
    limited,
    render,
)
from roll_r3.config.pipeline import RLVRConfig
from roll_r3.config.reading.explain import PATTERNS
from roll_r3.config.reading.field_paths import REPLACED
from roll_r3.config.rules.example import MINIMAL
from roll_r3.config.rules.paths import ENGINE
from tests.unit.config.conftest import findings_of, only


def test_all_mistakes_at_once_with_path_value_place_and_suggestion(load_text):
    text = """\
exp_name: two words
pretran: some/checkpoint
rollout_batch_size: yes
seed: .inf
learning_rate: 1e-5
actor_train:
  router_reply: {mode: R3}
  strategy_args:
    strategy_name: megatron_train
    strategy_config: {tensor_model_parallel_size: two, pipeline_paralel_size: 2}
  device_mapping: "__import__('os').system('true')"
actor_infer:
  router_replay: {mode: on}
  generating_args: {top_p: 1.5}
rewards:
  a: math
  b: {rewrd: math}
"""
    findings = {f.path: f for f in findings_of(load_text, text, "max_steps=-3")}
    with pytest.raises(InvalidConfigError) as caught:
        load_text(text, "max_steps=-3")
    lines = str(caught.value)
    megatron = "actor_train.strategy_args.strategy_config"
    expected = {
        "exp_name": ("bad-value", "run.yaml:1"),
        "pretrain": ("missing-field", "run.yaml"),
        "pretran": ("unknown-field", "run.yaml:2"),
        "rollout_batch_size": ("bad-value", "run.yaml:3"),
        "seed": ("bad-value", "run.yaml:4"),
        "learning_rate": ("unknown-field", "run.yaml:5"),
        "actor_train.router_reply": ("unknown-field", "run.yaml:7"),
        f"{megatron}.tensor_model_parallel_size": ("bad-value", "run.yaml:10"),
        f"{megatron}.pipeline_paralel_size": ("unknown-field", "run.yaml:10"),
        "actor_train.device_mapping": ("bad-value", "run.yaml:11"),
        "actor_infer.router_replay.mode": ("bad-value", "run.yaml:13"),
        "actor_infer.generating_args.top_p": ("bad-value", "run.yaml:14"),
        "rewards.a": ("bad-value", "run.yaml:16"),
        "rewards.b.rewrd": ("unknown-field", "run.yaml:17"),
        "rewards.b.reward": ("missing-field", "run.yaml:17"),
        "max_steps": ("bad-value", "override max_steps=-3"),
    }
    assert {path: f.rule for path, f in findings.items()} == {path: rule for path, (rule, _) in expected.items()}
    for path, (_, place) in expected.items():
        line = next(line for line in lines.splitlines() if line.strip().startswith((f"{path} ", f"{path}  ")))
        assert place in line, line
    assert findings["pretran"].fix == "did you mean pretrain?"
    assert findings["learning_rate"].fix == "did you mean actor_train.training_args.learning_rate?"
    assert findings["actor_train.router_reply"].fix == "did you mean actor_train.router_replay?"
    assert findings[f"{megatron}.pipeline_paralel_size"].fix.endswith("pipeline_model_parallel_size?")
    assert findings["rewards.b.rewrd"].fix == "did you mean rewards.b.reward?"
    assert findings["pretrain"].found == (("pretrain", ABSENT),)
    assert "never evaluated" in findings["actor_train.device_mapping"].why or "not evaluated" in lines
    assert "16 errors" in lines


@pytest.mark.parametrize(
    ("override", "why", "fix"),
    [
        ("kl_estimator=k9", "must be 'k2' or 'k3'", "write one of k2, k3"),
        (
            "adv_estimator=Dr_GRPO",
            "must be 'grpo', 'reinforce', 'rloo' or 'reinforce_plus_plus_baseline'",
            "write one of grpo, reinforce, rloo, reinforce_plus_plus_baseline; Dr. GRPO is grpo with "
            "norm_adv_by_std_in_grpo: false (docs/which_loss.md)",
        ),
        ("kl_estimator=k1", "k1 in the loss regularises nothing: its gradient is 0 in the mean. Write k2 or k3", ""),
        ("kl_penalty=k3", "k3 in the reward pulls towards nothing near the reference", ""),
        ("kl_penalty=kl2", "must be 'k1', 'k2' or 'abs'", "write one of k1, k2, abs"),
        (
            "track_with=[wandbe]",
            "must be 'tensorboard', 'wandb', 'mlflow', 'swanlab' or 'trackio'",
            "write one of tensorboard, wandb, mlflow, swanlab, trackio",
        ),
        ("seed=many", "must be an integer", "write a number, for example 42"),
        ("seed=1.5", "must be an integer", "write a number, for example 42"),
        ("seed=-1", "must be greater than or equal to 0", "write a number, for example 42"),
        ("seed=.inf", "must be a finite number", "write a number, for example 42"),
        (f"seed={2**70}", f"must be a number up to {2**63 - 1}", "write a number, for example 42"),
        ("seed=yes", "must be a number: YAML reads on, yes and true as a boolean", "write a number, for example 42"),
        ("pg_clip=[1]", "must be a number", "write a number, for example 0.2"),
        (f"{ENGINE}.mem_fraction_static=2", "must be less than 1", "write a number, for example 0.5"),
        (f"{ENGINE}.context_length=0", "must be greater than 0", "write a number, for example 1"),
        ("sigterm_grace_period=1e10", "must be less than or equal to 2592000", "write a number, for example 300.0"),
        ("use_kl_loss=maybe", "must be true or false", "write true or false"),
        ("output_dir=5", "must be text", 'write it in quotes, as in "5"'),
        ("output_dir=[a]", "must be text", "write text"),
        (
            "rewards.default={reward: math, tag_included: a}",
            "must be a list, as in [a, b]",
            "write a list, as in [a, b]",
        ),
        ("actor_train.router_replay=R3", "must be a section of", "its fields: mode, audit, audit_every"),
        ("rewards=math", "must be a section of", "write `name: value` lines below it"),
        ("exp_name='two words'", "must hold letters, digits, dots, underscores", "write a name such as two-words"),
        (f"exp_name={'x' * 200}", "must have at most 128 characters", ""),
        ("rewards.a={}", "this field must be given", "give it in the file, or as an override rewards.a.reward=..."),
        (
            f"{ENGINE}.server_args={{a: [1]}}",
            "must be text, or must be an integer",
            "write text or an integer",
        ),
    ],
)
def test_a_wrong_type_is_explained_in_words_and_says_what_to_write(load_text, override, why, fix):
    finding = only(load_text, MINIMAL, override)
    assert why in finding.why
    assert finding.fix.startswith(fix)
    assert bool(finding.fix) == bool(fix)


def test_every_pattern_of_the_schema_has_words():
    patterns = set(re.findall(r"'pattern': '(.*?)'", str(RLVRConfig.model_json_schema()).replace("\\\\", "\\")))
    assert patterns
    assert patterns <= set(PATTERNS)


def test_a_name_is_looked_for_in_other_sections_too(load_text):
    finding = only(load_text, MINIMAL, "learning_rat=1e-5")
    assert finding.fix == "did you mean actor_train.training_args.learning_rate?"


def test_an_unknown_name_without_a_likeness_lists_the_fields(load_text):
    finding = only(load_text, MINIMAL, "actor_train.router_replay.zzz=1")
    assert finding.fix == "fields here: mode, audit, audit_every"


def test_union_members_do_not_show_in_paths(load_text):
    finding = only(
        load_text, MINIMAL, "actor_infer.strategy_args.strategy_name=sglang", "rewards.a={reward: m, kwargs: {x: [1]}}"
    )
    assert finding.path == "rewards.a.kwargs.x"
    assert "text" in finding.why or "string" in finding.why


@pytest.mark.parametrize("written", ["on", "yes", "true"])
def test_a_replay_mode_that_yaml_reads_as_true_is_explained(load_text, written):
    text = MINIMAL.replace(
        "actor_infer:\n  router_replay: {mode: R3}", f"actor_infer:\n  router_replay: {{mode: {written}}}"
    )
    finding = only(load_text, text)
    assert "YAML reads on/yes/true as the boolean True" in finding.why
    assert "R2 or R3" in finding.why


MANY = MAX_FINDINGS + 50


@pytest.mark.timeout(30)
@pytest.mark.parametrize(
    ("text", "rule", "count"),
    [
        ("".join(f"k{i}: 1\n" for i in range(9000)), "unknown-field", 9000),
        ("".join(f"k{i}: ${{z}}\n" for i in range(9000)), "interpolation", 9000),
        ("seed: 1\n" * 9000, "duplicate-key", 8999),
        ("x: [" + "!x 1," * 9000 + "]\n", "yaml-tag", 9000),
        ("x: [" + ".inf," * 9000 + "]\n", "bad-value", 9000),
        ("rewards: {" + ",".join(f"r{i}: {{}}" for i in range(9000)) + "}\n", "missing-field", 9000),
    ],
    ids=lambda value: value if isinstance(value, str) and len(value) < 30 else "",
)
def test_of_thousands_of_mistakes_the_first_are_told_and_all_are_counted(load_text, text, rule, count):
    with pytest.raises(InvalidConfigError) as caught:
        load_text(MINIMAL + text)
    *told, last = caught.value.findings
    assert [finding.rule for finding in told] == [rule] * MAX_FINDINGS
    assert (last.rule, last.severity, last.count) == (MORE, "error", count - MAX_FINDINGS)
    assert f"{count - MAX_FINDINGS:,} more errors are not listed" in str(caught.value)
    assert str(caught.value).endswith(f"{count:,} errors")
    assert len(str(caught.value)) < 200_000
    assert json.loads(json.dumps(as_json(caught.value.findings, caught.value.origins)))[-1]["severity"] == "error"


@pytest.mark.timeout(20)
def test_a_long_list_of_booleans_is_gone_through_once(load_text):
    assert only(load_text, f"{MINIMAL}x: [{'true,' * 19_000}]\n").rule == "unknown-field"


def test_limited_keeps_the_order_and_counts_each_severity():
    findings = [Finding(f"r{i}", "note" if i % 2 else "error", (), "why") for i in range(2 * MANY)]
    kept = limited(findings)
    assert kept[:-2] == tuple(findings[: 2 * MAX_FINDINGS])
    assert [(f.severity, f.count) for f in kept[-2:]] == [("error", 50), ("note", 50)]
    assert limited(kept) == kept
    assert limited(findings[:10]) == tuple(findings[:10])
    assert render(kept, Origins("x")).endswith(f"x: {MANY} errors and {MANY} notes")


def test_of_a_finding_with_many_fields_people_see_the_first():
    finding = Finding("r", "error", tuple((f"a.{i}", i) for i in range(50)), "why", "fix")
    text = render([finding], Origins("x"))
    assert "a.19 = 19" in text
    assert "a.20" not in text
    assert "and 30 more fields\n    fix: fix" in text
    assert len(as_json([finding], Origins("x"))[0]["fields"]) == 50


@pytest.mark.parametrize("name", ["sft_train", "prompt_key", "positive_loss_coef"])
def test_what_is_hardly_like_a_field_is_not_taken_for_it(load_text, name):
    assert "did you mean" not in only(load_text, f"{MINIMAL}{name}: 1\n").fix


@pytest.mark.parametrize(
    ("name", "meant"), [("sead", "seed"), ("max_step", "max_steps"), ("respons_length", "response_length")]
)
def test_a_slip_is_still_recognised(load_text, name, meant):
    assert only(load_text, f"{MINIMAL}{name}: 1\n").fix == f"did you mean {meant}?"


def test_a_choice_of_several_strategies_is_listed_once(load_text):
    finding = only(load_text, MINIMAL, "actor_infer.strategy_args.strategy_config.dtype=bf17")
    assert finding.fix == "write one of bfloat16, float16, float32"


def test_a_replaced_field_is_refused_with_its_replacement(load_text):
    with pytest.raises(InvalidConfigError) as caught:
        load_text(f"{MINIMAL}rollout_correction: {{mode: token_tis, cap: 3}}\n")
    fixes = {finding.path: finding.fix for finding in caught.value.findings}
    assert fixes == {f"rollout_correction.{name}": REPLACED[f"rollout_correction.{name}"] for name in ("mode", "cap")}
    assert "rollout_correction.is_weight: token" in str(caught.value)
