"""YAML and overrides to a configuration, and what is said about every kind of mistake."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from roll_r3.config.explain import PATTERNS
from roll_r3.config.load import MAX_BYTES, load
from roll_r3.config.load import load_text as load_text_as_it_is
from roll_r3.config.pipeline import RLVRConfig
from roll_r3.config.report import ABSENT, Finding, InvalidConfigError
from roll_r3.config.rules.example import MINIMAL
from roll_r3.config.rules.paths import ENGINE
from roll_r3.config.yaml_file import MAX_NODES, to_yaml
from roll_r3.errors import ConfigError
from roll_r3.preflight.check import check
from roll_r3.preflight.surroundings import Surroundings
from tests.unit.config.conftest import LoadText


def findings_of(load_text: LoadText, text: str, *overrides: str) -> list[Finding]:
    with pytest.raises(InvalidConfigError) as caught:
        load_text(text, *overrides)
    return list(caught.value.findings)


def only(load_text: LoadText, text: str, *overrides: str) -> Finding:
    findings = findings_of(load_text, text, *overrides)
    assert len(findings) == 1, findings
    return findings[0]


def test_a_file_and_its_defaults(load_text):
    config = load_text().config
    assert config.samples_per_step == 64
    assert config.actor_train.router_replay.mode == "R3"
    assert config.reference is None


def test_overrides_are_read_as_yaml_and_the_last_one_wins(load_text):
    config = load_text(
        MINIMAL,
        "seed=7",
        "seed=8",
        "actor_train.training_args.learning_rate=1e-5",
        "actor_train.device_mapping=[4, 5, 6]",
        "actor_train.device_mapping.1=9",
        "actor_infer.generating_args={top_k: 5}",
        "reference.device_mapping=list(range(0,4,2))",
        "rewards.default={reward: math, tag_included: [a]}",
        "actor_train.data_args.file_name=a=b.jsonl",
    ).config
    assert config.seed == 8
    assert config.actor_train.training_args.learning_rate == 1e-5
    assert config.actor_train.device_mapping == (4, 9, 6)
    assert config.actor_infer.generating_args.top_k == 5
    assert config.reference is not None
    assert config.reference.device_mapping == (0, 2)
    assert config.rewards["default"].tag_included == ("a",)
    assert config.actor_train.data_args.file_name == "a=b.jsonl"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("seed", "not an override"),
        ("=3", "not an override"),
        ("a..b=3", "not an override"),
        ("seed =3", "not an override"),
        ("actor_train.data_args.file_name.x=3", "holds a value"),
        ("actor_train.device_mapping.3=3", "list of 2 items"),
        ("actor_train.device_mapping.x=3", "list of 2 items"),
        ("seed=[1", "not YAML"),
        ("seed=!!python/object/apply:os.getcwd []", "tag"),
        ("rewards={a: 1, a: 2}", "given twice"),
    ],
)
def test_a_wrong_override_is_named(load_text, override, message):
    finding = only(load_text, MINIMAL, "actor_train.device_mapping=[0, 1]", override)
    assert message in finding.why


def test_interpolation_follows_overrides(load_text):
    text = MINIMAL + (
        "max_steps: ${rollout_batch_size}\n"
        "output_dir: out/${exp_name}/${actor_train.training_args.learning_rate}\n"
        "reference:\n"
        "  device_mapping: ${actor_train.device_mapping}\n"
        "  router_replay: {mode: disable}\n"
        "  infer_batch_size: ${..seed}\n"
        "seed: ${actor_train.device_mapping.1}\n"
    )
    config = load_text(
        text,
        "rollout_batch_size=32",
        "actor_train.training_args.learning_rate=0.5",
        "actor_train.device_mapping=[2, 3]",
    ).config
    assert config.max_steps == 32
    assert config.output_dir == "out/demo/0.5"
    assert config.reference is not None
    assert config.reference.device_mapping == (2, 3)
    assert config.reference.infer_batch_size == 3


def test_a_section_can_be_taken_over_whole(load_text):
    text = MINIMAL + (
        "reference:\n"
        "  strategy_args:\n"
        "    strategy_name: megatron_infer\n"
        "    strategy_config: ${actor_train.strategy_args.strategy_config}\n"
    )
    strategy = "{strategy_name: megatron_train, strategy_config: {tensor_model_parallel_size: '${seed}'}}"
    config = load_text(text, f"actor_train.strategy_args={strategy}", "seed=2").config
    assert config.reference is not None
    assert config.reference.strategy_args.strategy_config.tensor_model_parallel_size == 2


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("${nowhere}", "not found"),
        ("${seed}", "Recursive"),
        ("${actor_train", "only ${section.field} is resolved"),
        ("${oc.env:HOME}", "environment variables"),
        ("x${oc.env:HOME,x}", "environment variables"),
        ("${${a}:HOME}", "environment variables"),
        ("\\${oc.env:HOME}", "environment variables"),
        ("${oc.decode:'1'}", "environment variables"),
        ("???", "still to be filled in"),
    ],
)
def test_an_interpolation_that_cannot_be_resolved_is_named(load_text, value, message):
    finding = only(load_text, f"{MINIMAL}seed: {yaml.safe_dump(value).splitlines()[0]}\n")
    assert message in finding.why
    assert finding.path == "seed"


def test_the_environment_is_never_read(load_text, monkeypatch):
    monkeypatch.setenv("ROLL_R3_SECRET", "hunter2")
    with pytest.raises(InvalidConfigError) as caught:
        load_text(MINIMAL + "output_dir: ${oc.env:ROLL_R3_SECRET}\n")
    assert "hunter2" not in str(caught.value)
    assert "output_dir=$VARIABLE" in str(caught.value), "it says how to pass one"


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


def test_of_another_strategy_nothing_is_said_about_its_settings(load_text):
    strategy = "{strategy_name: tensorrt, strategy_config: {gpu_memory_utilization: 0.8, tp_size: two}}"
    finding = only(load_text, MINIMAL, f"actor_infer.strategy_args={strategy}")
    assert finding.path == "actor_infer.strategy_args.strategy_name"
    assert finding.fix == "write one of sglang, vllm, hf_infer"
    loaded = load_text_as_it_is(MINIMAL, "run.yaml", [f"actor_infer.strategy_args={strategy}"])
    assert "actor_infer.strategy_args" in loaded.doubtful, "rules do not judge its defaults"
    only(load_text, MINIMAL, f"actor_infer.strategy_args={strategy.replace('two', 'yes')}")
    right = "{strategy_name: sglang, strategy_config: {gpu_memory_share: 0.8, tp_size: two}}"
    assert len(findings_of(load_text, MINIMAL, f"actor_infer.strategy_args={right}")) == 2
    others = findings_of(load_text, MINIMAL, f"actor_infer.strategy_args={strategy}", "actor_train.strategy_args.x=1")
    assert len(others) == 2, "of another role it is"


def test_a_name_is_looked_for_in_other_sections_too(load_text):
    finding = only(load_text, MINIMAL, "learning_rat=1e-5")
    assert finding.fix == "did you mean actor_train.training_args.learning_rate?"


def test_an_unknown_name_without_a_likeness_lists_the_fields(load_text):
    finding = only(load_text, MINIMAL, "actor_train.router_replay.zzz=1")
    assert finding.fix == "fields here: mode, audit, audit_every"


NAMES = {
    "actor_infer": ("sglang", "vllm", "hf_infer"),
    "actor_train": ("megatron_train", "fsdp2_train"),
    "reference": ("megatron_infer", "fsdp2_infer"),
}


@pytest.mark.parametrize("role", NAMES)
@pytest.mark.parametrize("name", ["tensorrt", "Sglang", "[a]", "{a: b}", "3", "null", "true", "''"])
def test_a_strategy_that_there_is_not_is_one_mistake_whatever_its_settings_are(load_text, role, name):
    args = (
        f"{role}.strategy_args={{strategy_name: {name}, strategy_config: {{gpu_memory_utilization: 0.8, tp_size: x}}}}"
    )
    finding = only(load_text, MINIMAL, args)
    assert (finding.rule, finding.path) == ("bad-value", f"{role}.strategy_args.strategy_name")
    assert finding.found[0][1] == yaml.safe_load(name)
    assert finding.why == "should be " + " or ".join(map(repr, NAMES[role]))


@pytest.mark.parametrize("role", NAMES)
def test_a_strategy_is_chosen_by_its_name_and_its_settings_are_its_own(load_text, role):
    default = NAMES[role][0]
    for written, meant in (("{}", default), *((f"{{strategy_name: {name}}}", name) for name in NAMES[role])):
        args = dict(load_text(MINIMAL, f"{role}.strategy_args={written}").config)[role].strategy_args
        assert args.strategy_name == meant
    foreign = "zzz" if role == "actor_infer" else "recompute"
    finding = only(load_text, MINIMAL, f"{role}.strategy_args={{strategy_config: {{{foreign}: true}}}}")
    assert finding.rule == "unknown-field", "without a name the settings are those of the first strategy"


def test_only_settings_of_the_named_strategy_are_suggested(load_text):
    sglang = "actor_infer.strategy_args={strategy_name: sglang, strategy_config: {tp_sise: 2}}"
    hf = "actor_infer.strategy_args={strategy_name: hf_infer, strategy_config: {zzz: 2}}"
    assert only(load_text, MINIMAL, sglang).fix == "did you mean actor_infer.strategy_args.strategy_config.tp_size?"
    assert only(load_text, MINIMAL, hf).fix == "fields here: dtype, max_running_requests, weight_bucket_mb"


def test_of_a_strategy_that_there_is_not_nothing_is_known_and_other_mistakes_show(tmp_path):
    (tmp_path / "run.yaml").write_text(MINIMAL)
    unknown = "actor_train.strategy_args={strategy_name: vllm, strategy_config: {pipeline_model_parallel_size: 3}}"
    loaded = load(tmp_path / "run.yaml", [unknown, "actor_train.device_mapping=range(3)", "max_steps=0"])
    assert {f.path for f in loaded.findings} == {"max_steps", "actor_train.strategy_args.strategy_name"}
    assert "actor_train.strategy_args" in loaded.doubtful
    found = {f.path for f in check(loaded, Surroundings())}
    assert found == {*(f.path for f in loaded.findings), "pretrain"}, "no layout, so nothing on samples over ranks"


def test_union_members_do_not_show_in_paths(load_text):
    finding = only(
        load_text, MINIMAL, "actor_infer.strategy_args.strategy_name=sglang", "rewards.a={reward: m, kwargs: {x: [1]}}"
    )
    assert finding.path == "rewards.a.kwargs.x"
    assert "text" in finding.why or "string" in finding.why


@pytest.mark.parametrize(
    ("written", "mode"),
    [
        ("off", "disable"),
        ("no", "disable"),
        ("false", "disable"),
        ("disable", "disable"),
        ('"off"', "disable"),
        ("r3", "R3"),
        ("R2", "R2"),
    ],
)
def test_ways_to_write_a_replay_mode(load_text, written, mode):
    assert load_text(MINIMAL, f"actor_train.router_replay.mode={written}").config.actor_train.router_replay.mode == mode


@pytest.mark.parametrize("written", ["on", "yes", "true"])
def test_a_replay_mode_that_yaml_reads_as_true_is_explained(load_text, written):
    text = MINIMAL.replace(
        "actor_infer:\n  router_replay: {mode: R3}", f"actor_infer:\n  router_replay: {{mode: {written}}}"
    )
    finding = only(load_text, text)
    assert "YAML reads on/yes/true as the boolean True" in finding.why
    assert "R2 or R3" in finding.why


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is empty"),
        ("# nothing\n", "is empty"),
        ("- a\n- b\n", "not a list"),
        ("just text\n", "not text"),
        ("42\n", "not a number"),
        ("a: [1\n", "is not YAML"),
        ("a: 1\n---\nb: 2\n", "is not YAML"),
        ("a: \x07\n", "is not YAML"),
        ("exp_name: a\nseed: 1\nexp_name: b\n", "given twice, first at"),
        ("exp_name: !!python/object/apply:os.system ['true']\n", "nothing is constructed or executed"),
        ("exp_name: !mine x\n", "tag !mine"),
        ("1: x\n", "a key must be text"),
        ("? [a]\n: x\n", "a key must be text"),
        ("a: &x {b: 1}\nc:\n  <<: *x\n", "merge key"),
        ("a: &x [*x]\n", "contains itself"),
        ("a: " + "[" * 60 + "]" * 60 + "\n", "deep"),
        ("a: " + "[" * 5000 + "]" * 5000 + "\n", "deep"),
        ("a: " + "9" * 5000 + "\n", "more than 100 digits"),
    ],
)
def test_files_that_are_no_configuration(load_text, text, message):
    assert message in findings_of(load_text, text)[0].why


def test_a_key_that_is_given_twice_names_both_lines(load_text):
    with pytest.raises(InvalidConfigError) as caught:
        load_text("exp_name: a\nseed: 1\nexp_name: b\n")
    assert "run.yaml:1" in caught.value.findings[0].why
    assert "exp_name = b" in str(caught.value)
    assert "run.yaml:3" in str(caught.value)


def test_a_yaml_bomb_is_refused_quickly(load_text):
    levels = "".join(
        f"{name}: &{name} [{', '.join([f'*{inner}'] * 10)}]\n" for inner, name in zip("abcdefg", "bcdefgh", strict=True)
    )
    assert str(MAX_NODES) in only(load_text, f"a: &a [x]\n{levels}").why


@pytest.mark.parametrize(
    "value",
    [
        "!!int ''",
        "!!float ''",
        "!!bool abc",
        "!!bool ''",
        "!!int x",
        "!!int 1:30",
        "!!float 0x1",
        "!!null x",
        "!!int [1]",
        "!!str [a]",
        "!!map x",
        "!!seq {a: 1}",
        "!!map [a]",
        "!!float {a: 1}",
        "!!int 0x_",
    ],
)
def test_a_tag_before_what_it_does_not_fit_is_named_with_its_line(load_text, value):
    finding = only(load_text, f"{MINIMAL}seed: {value}\n")
    assert (finding.rule, finding.path) == ("yaml-tag", "seed")
    assert value.split()[0] in finding.why
    assert only(load_text, MINIMAL, f"seed={value}") == finding


def test_a_tag_before_what_it_fits_changes_nothing(load_text):
    text = "max_steps: !!int '0x1F'\npg_clip: !!float 1\noutput_dir: !!str 12\nreference: !!null ''\n"
    config = load_text(MINIMAL + text, "actor_train.device_mapping=!!seq [!!int 3]").config
    assert (config.max_steps, config.pg_clip, config.output_dir, config.reference) == (31, 1.0, "12", None)
    assert config.actor_train.device_mapping == (3,)


@pytest.mark.parametrize("text", ["0x_", "0b_", "-0x_", "0x", "0b", "0x_1"])
def test_a_number_without_digits_is_text(load_text, text):
    assert load_text(f"{MINIMAL}output_dir: {text}\n").config.output_dir == text


def test_digits_may_be_grouped(load_text):
    config = load_text(MINIMAL, "seed=0x1_F", "max_steps=0b1_0", "prompt_length=1_000").config
    assert (config.seed, config.max_steps, config.prompt_length) == (31, 2, 1000)


def bomb(first: str, line: str) -> str:
    return f"x0: {first}\n" + "".join(f"x{i}: {line.replace('@', f'${{x{i - 1}}}')}\n" for i in range(1, 25))


@pytest.mark.parametrize(
    "text",
    [
        bomb("[a]", "['@', '@']"),
        bomb("{a: b}", "{a: '@', b: '@'}"),
        bomb("a", "'@@'"),
        bomb("''", "'@@'"),
        bomb("a", "{a: '@@'}").replace("}}", ".a}}"),
        bomb("{a: {a: b}}", "{a: '@', b: '@', c: '@'}"),
        f"x0: {'a' * 600_000}\noutput_dir: ${{x0}}${{x0}}\n",
        f"x0: [{'a, ' * 2000}]\nx1: [" + "'${x0}', " * 20 + "]\n",
        f"output_dir: {'${exp_name}' * 5000}\n",
        "x1: {a: '${x2}', b: '${x2}'}\nx2: {a: '${x1}', b: '${x1}'}\n",
        "x1: ['${.}', '${.}']\n",
        "x1: ${x1.a}\n",
        "x0: a\n" + "".join(f"x{i}: ${{x{i - 1}}}\n" for i in range(1, 2000)),
        "x0: a\n" + "".join(f"x{i}: ${{x{i + 1}}}\n" for i in range(2000)),
    ],
    ids=lambda text: text[:40],
)
def test_interpolations_that_grow_without_bound_are_refused_quickly(load_text, text):
    start = time.process_time()
    findings = findings_of(load_text, MINIMAL + text)
    assert "interpolation" in {finding.rule for finding in findings}
    assert time.process_time() - start < 5, "a second on any machine; this one may be busy"


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("output_dir: ${big}${big}", "characters"),
        ("rewards: ['${many}', '${many}', '${many}']", "10000 values"),
        ("output_dir: " + "${exp_name}" * 1001, "1000 references"),
        ("rewards: {a: '${rewards}'}", "Recursive"),
    ],
)
def test_what_an_interpolation_has_too_much_of_is_named(load_text, line, reason):
    text = f"{MINIMAL}big: {'a' * 600_000}\nmany: [{', '.join('a' * 4_000)}]\n{line}\n"
    interpolations = [f for f in findings_of(load_text, text) if f.rule == "interpolation"]
    assert interpolations
    assert all(reason in finding.why for finding in interpolations)


def test_interpolations_that_are_just_small_enough_are_resolved(load_text):
    chain = "max_steps: ${x30}\n" + "".join(f"x{i}: ${{x{i - 1}}}\n" for i in range(1, 31)) + "x0: 7\n"
    findings = findings_of(load_text, MINIMAL + chain)
    assert {finding.rule for finding in findings} == {"unknown-field"}, "the x's alone"
    config = load_text(
        MINIMAL,
        f"output_dir='{'${exp_name}' * 20}'",
        "seed=${actor_infer.device_mapping[-1]}",
        "actor_infer.device_mapping=[3]",
    ).config
    assert config.output_dir == "demo" * 20
    assert config.seed == 3


def test_files_that_cannot_be_read(tmp_path):
    with pytest.raises(ConfigError, match="does not exist"):
        load(tmp_path / "missing.yaml")
    with pytest.raises(ConfigError, match="cannot be read"):
        load(tmp_path)
    (tmp_path / "latin.yaml").write_bytes(b"exp_name: \xe9\n")
    with pytest.raises(ConfigError, match="cannot be read"):
        load(tmp_path / "latin.yaml")
    (tmp_path / "large.yaml").write_text("#" * (MAX_BYTES + 1))
    with pytest.raises(ConfigError, match="larger than"):
        load(tmp_path / "large.yaml")
    os.mkfifo(tmp_path / "pipe.yaml")
    for name in (tmp_path / "pipe.yaml", Path("/dev/zero"), tmp_path / ("x" * 300), tmp_path / "nul\0"):
        with pytest.raises(ConfigError, match="cannot be read"):
            load(name)
    if os.geteuid():
        (tmp_path / "locked.yaml").touch(mode=0)
        with pytest.raises(ConfigError, match="cannot be read"):
            load(tmp_path / "locked.yaml")


def test_numbers_in_scientific_notation_and_dates(load_text):
    config = load_text(MINIMAL + "max_steps: 1e3\noutput_dir: 2026-01-02\n", "pg_clip=2e-1").config
    assert config.max_steps == 1000
    assert config.output_dir == "2026-01-02"
    assert config.pg_clip == 0.2


def test_what_is_printed_loads_to_the_same(load_text, tmp_path):
    strategy = "{strategy_name: megatron_train, strategy_config: {moe_router_dtype: null}}"
    config = load_text(MINIMAL, f"actor_train.strategy_args={strategy}", "exp_name='1e5'").config
    (tmp_path / "printed.yaml").write_text(to_yaml(config))
    assert load(tmp_path / "printed.yaml").config == config


_SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20)
_VALUES = st.recursive(
    _SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=9), inner, max_size=3),
    max_leaves=8,
)
_PATHS = st.sampled_from(
    [
        "exp_name",
        "seed",
        "pg_clip",
        "actor_train",
        "actor_train.device_mapping",
        "actor_train.router_replay.mode",
        "actor_train.strategy_args",
        "actor_infer.strategy_args.strategy_config.server_args",
        "actor_train.data_args.file_name",
        "rewards",
        "rewards.default.kwargs.x",
        "reference",
        "track_with.0",
    ]
)


@given(path=_PATHS, value=_VALUES)
def test_any_value_anywhere_loads_or_is_reported(tmp_path_factory, path, value):
    file = tmp_path_factory.getbasetemp() / "fuzz.yaml"
    file.write_text(MINIMAL)
    text = (
        yaml.safe_dump(value, default_flow_style=True, allow_unicode=True, width=10**6)
        .removesuffix("...\n")
        .rstrip("\n")
    )
    try:
        load(file, [f"{path}={text}"])
    except InvalidConfigError as error:
        refusal = error
    else:
        return
    assert refusal.findings
    assert all(finding.why for finding in refusal.findings)


def test_importing_the_configuration_brings_in_no_engine():
    code = (
        "import sys, roll_r3.run, roll_r3.config.load, roll_r3.config.docs, roll_r3.preflight.check\n"
        "heavy = {'torch', 'ray', 'transformers', 'sglang', 'megatron', 'mbridge', 'vllm', 'omegaconf', 'datasets'}\n"
        "sys.exit(', '.join(sorted(heavy & set(sys.modules))) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, f"imported: {done.stderr}"


def test_every_shipped_configuration_loads():
    files = sorted((Path(__file__).parents[3] / "configs").glob("**/*.yaml"))
    assert files
    for file in files:
        load(file)
