"""YAML itself: what is no configuration, tags, numbers."""

from __future__ import annotations

import pytest

from roll_r3.config.report import InvalidConfigError
from roll_r3.config.rules.example import MINIMAL
from roll_r3.config.yaml_file import MAX_NODES
from tests.unit.config.conftest import findings_of, only


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


def test_numbers_in_scientific_notation_and_dates(load_text):
    config = load_text(MINIMAL + "max_steps: 1e3\noutput_dir: 2026-01-02\n", "pg_clip=2e-1").config
    assert config.max_steps == 1000
    assert config.output_dir == "2026-01-02"
    assert config.pg_clip == 0.2
