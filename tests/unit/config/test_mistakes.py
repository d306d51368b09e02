"""What is said about wrong names and values: all at once, where they stand, and what to write instead."""

from __future__ import annotations

import re

import pytest

from roll_r3.config.explain import PATTERNS
from roll_r3.config.pipeline import RLVRConfig
from roll_r3.config.report import ABSENT, InvalidConfigError
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
        ("kl_estimator=k9", "should be 'k1', 'k2' or 'k3'", "write one of k1, k2, k3"),
        ("track_with=[wandb]", "should be 'tensorboard'", "write tensorboard"),
        ("seed=many", "should be a whole number", "write a number, for example 42"),
        ("seed=1.5", "should be a whole number", "write a number, for example 42"),
        ("seed=-1", "should be greater than or equal to 0", "write a number, for example 42"),
        ("seed=.inf", "should be a finite number", "write a number, for example 42"),
        (f"seed={2**70}", f"should be a number up to {2**63 - 1}", "write a number, for example 42"),
        ("seed=yes", "YAML reads on, yes and true as a boolean; this is a number", "write the number, for example 42"),
        ("pg_clip=[1]", "should be a number", "write a number, for example 0.2"),
        (f"{ENGINE}.mem_fraction_static=2", "should be less than 1", "write a number, for example 0.5"),
        (f"{ENGINE}.context_length=0", "should be greater than 0", "write a number, for example 1"),
        ("use_kl_loss=maybe", "should be true or false", "write true or false"),
        ("output_dir=5", "should be text", 'write it in quotes, as in "5"'),
        ("output_dir=[a]", "should be text", "write text"),
        (
            "rewards.default={reward: math, tag_included: a}",
            "should be a list, as in [a, b]",
            "write a list, as in [a, b]",
        ),
        ("actor_train.router_replay=R3", "should be a section of", "its fields: mode, audit, audit_every"),
        ("rewards=math", "should be a section of", "write `name: value` lines below it"),
        ("exp_name='two words'", "should hold letters, digits, dots, underscores", "write a name such as two-words"),
        (f"exp_name={'x' * 200}", "should have at most 128 characters", ""),
        ("rewards.a={}", "this field must be given", "give it in the file, or as an override rewards.a.reward=..."),
        (
            f"{ENGINE}.server_args={{a: [1]}}",
            "should be text, or should be a whole number",
            "write text or a whole number",
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
