"""`${...}` in a file: its value, rejected forms, and limits."""

from __future__ import annotations

import re
import time

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from roll_r3.config.findings.report import InvalidConfigError
from roll_r3.config.reading.interpolate import resolve
from roll_r3.config.rules.example import MINIMAL
from tests.unit.config.conftest import findings_of


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
        ("${nowhere}", "${nowhere} is not found"),
        ("${.....seed}", "is not found"),
        ("x${actor_train}", "is a section or a list"),
        ("${dollar}{exp_name}", "another reference"),
        ("${seed}", "leads to itself"),
        ("${actor_train", "only ${section.field} is resolved"),
        ("${oc.env:HOME}", "environment variables"),
        ("x${oc.env:HOME,x}", "environment variables"),
        ("${${a}:HOME}", "environment variables"),
        ("\\${oc.env:HOME}", "environment variables"),
        ("\\${exp_name}", "environment variables"),
        ("${oc.decode:'1'}", "environment variables"),
        ("???", "still to be filled in"),
    ],
)
def test_an_interpolation_that_cannot_be_resolved_is_named(load_text, value, message):
    findings = findings_of(load_text, f"{MINIMAL}dollar: $\nseed: {yaml.safe_dump(value).splitlines()[0]}\n")
    (finding,) = (finding for finding in findings if finding.path != "dollar")
    assert message in finding.why
    assert finding.path == "seed"


def test_the_environment_is_never_read(load_text, monkeypatch):
    monkeypatch.setenv("ROLL_R3_SECRET", "hunter2")
    with pytest.raises(InvalidConfigError) as caught:
        load_text(MINIMAL + "output_dir: ${oc.env:ROLL_R3_SECRET}\n")
    assert "hunter2" not in str(caught.value)
    assert "output_dir=$VARIABLE" in str(caught.value), "it says how to pass one"


def doubling(first: str, line: str) -> str:
    return f"x0: {first}\n" + "".join(f"x{i}: {line.replace('@', f'${{x{i - 1}}}')}\n" for i in range(1, 25))


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (doubling("[a]", "['@', '@']"), "characters"),
        (doubling("a", "'@@'"), "characters"),
        (doubling("{a: b}", "{a: '@', b: '@'}"), "characters"),
        (f"x0: {'a' * 600_000}\noutput_dir: ${{x0}}${{x0}}\n", "characters"),
        (f"x0: [{'a, ' * 2000}]\nx1: [" + "'${x0}', " * 20 + "]\n", "characters"),
        (f"x0: {'a' * 2000}\noutput_dir: {'${x0}' * 1000}\n", "characters"),
        ("x1: {a: '${x2}', b: '${x2}'}\nx2: {a: '${x1}', b: '${x1}'}\n", "itself"),
        ("x1: ${x1.a}\n", "itself"),
        ("x0: a\n" + "".join(f"x{i}: ${{x{i + 1}}}\n" for i in range(2000)), "itself, or through too many"),
        ("".join(f"x{i}: ${{x{i * 7 % 997}}}\n" for i in range(1, 997)), "itself, or through too many"),
        ("x0: {a: {a: '${x0.a}'}}\n", "itself"),
    ],
    ids=lambda text: text[:40],
)
def test_references_that_grow_without_bound_are_rejected_quickly(load_text, text, reason):
    start = time.process_time()
    interpolations = [f for f in findings_of(load_text, MINIMAL + text) if f.rule == "interpolation"]
    assert reason in interpolations[0].why
    assert time.process_time() - start < 5, "a second on any machine; this one may be busy"


@pytest.mark.parametrize(
    "text",
    [
        f"a: ${{{'a.' * 200_000}a}}\n" + "".join(f"b{i}: ${{a.x}}\n" for i in range(300)),
        "".join(f"b{i}: ${{{'a.' * 480}x{i}}}\n" for i in range(1000)),
        f"a: &a '{'${' * 8_000}'\nb: [{', '.join(['*a'] * 18_000)}]\n",
        f"a: &a '{'${' * 200_000}'\nb: [{', '.join(['*a'] * 300)}]\n",
        f"a: &a '{'${seed}' * 60_000}'\nb: [{', '.join(['*a'] * 300)}]\n",
    ],
    ids=[
        "long reference on the way",
        "long references",
        "many aliases of a rejected text",
        "aliases of a rejected text",
        "aliases of a long text",
    ],
)
def test_a_long_text_with_references_is_read_once(load_text, text):
    start = time.process_time()
    with pytest.raises(InvalidConfigError) as caught:
        load_text(MINIMAL + text)
    assert len(str(caught.value)) < 1 << 20, "neither values nor origins are shown whole"
    assert time.process_time() - start < 4


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


_NAMES = ("a", "b", "c")
_REFERENCES = st.builds("${{{}{}}}".format, st.sampled_from(["", ".", "..", "..."]), st.sampled_from(
    [*_NAMES, "a.a", "a.b", "b.c", "c.a", "a[0]", "b[-1]", "a.b.c", "c[1].a"]
))  # fmt: skip
_VALUES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(0, 9),
    st.sampled_from(["x", "y z"]),
    _REFERENCES,
    _REFERENCES.map("-{}".format),
)
_TREES = st.recursive(
    _VALUES, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(_NAMES), inner, max_size=3)
)


@given(tree=st.fixed_dictionaries(dict.fromkeys(_NAMES, _TREES)))
def test_references_mean_what_they_mean_to_omegaconf(tree):
    resolved, found = resolve(tree, {})
    try:
        expected = OmegaConf.to_container(OmegaConf.create(tree), resolve=True)
    except (OmegaConfBaseException, RecursionError):
        assert found
        return
    if found:
        assert re.search(r"-[\[{]", str(expected)), "OmegaConf makes a text of a section"
    else:
        assert resolved == expected
