"""`${...}` in a file: what it becomes, what it may not be, and how much of it there may be."""

from __future__ import annotations

import time

import pytest
import yaml

from roll_r3.config.report import InvalidConfigError
from roll_r3.config.rules.example import MINIMAL
from tests.unit.config.conftest import findings_of, only


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
