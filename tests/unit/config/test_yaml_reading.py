"""YAML itself: unreadable documents, tags, numbers."""

from __future__ import annotations

import pytest

from roll_r3.config.findings.report import InvalidConfigError
from roll_r3.config.reading.yaml_file import MAX_NODES, MAX_PATH, parse_yaml, to_yaml
from roll_r3.config.rules.example import MINIMAL
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
        ("1.5: x\n", "a key must be text"),
        ("on: x\n", "a key must be text"),
        ("1: x\n'1': y\n", "given twice, first at"),
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


@pytest.mark.parametrize(
    "text", ['"\\ud800": 1', 'rewards: {"\\ud800": {}}', 'rewards: {r: {reward: math, kwargs: {"\\udfff": 1}}}']
)
def test_a_key_that_no_file_can_hold_is_refused_with_its_line(load_text, text):
    finding = only(load_text, f"{MINIMAL}{text}\n")
    assert f"line {MINIMAL.count(chr(10)) + 1}, holds half of a surrogate pair" in finding.why
    finding.why.encode()


@pytest.mark.parametrize("text", ['"a\\ud800"', '["\\ud83d\\ude00"]', '{a: {b: "\\udc80"}}'])
def test_a_text_that_no_file_can_hold_is_refused(load_text, text):
    rewards = f"rewards={{r: {{reward: math, kwargs: {{x: {text}}}}}}}"
    finding = only(load_text, MINIMAL, rewards)
    assert finding.path.startswith("rewards.r.kwargs.x")
    assert "holds half of a surrogate pair" in finding.why


@pytest.mark.parametrize("override", ["\udc80=1", "rewards.\udc80={}", "exp_name=\udcff"])
def test_an_override_that_is_not_utf_8_is_refused(load_text, override):
    finding = only(load_text, MINIMAL, override)
    assert "is not UTF-8" in finding.why
    finding.why.encode()


def test_a_letter_beyond_16_bits_is_printed_and_read_back(load_text):
    config = load_text(MINIMAL + 'rewards: {r: {reward: math, kwargs: {"\\U0001F600": "\\U0001F600"}}}\n').config
    assert load_text(to_yaml(config).encode().decode()).config == config


@pytest.mark.timeout(20)
def test_a_long_path_is_not_kept_for_every_value_below_it(load_text):
    finding = only(load_text, f"{MINIMAL}? {'k' * 900_000}\n: [{'0,' * 15_000}]\n")
    assert f"at most {MAX_PATH}" in finding.why
    assert len(finding.why) < 300
    key = "k" * (MAX_PATH - len("rewards.r.kwargs."))
    rewards = f"rewards: {{r: {{reward: math, kwargs: {{{key}%s: 1}}}}}}"
    assert load_text(f"{MINIMAL}{rewards % ''}\n").config.rewards["r"].kwargs == {key: 1}
    assert f"{MAX_PATH + 1} characters" in only(load_text, f"{MINIMAL}{rewards % 'k'}\n").why
    assert "is not an override" in only(load_text, MINIMAL, f"{'k' * (MAX_PATH + 1)}=1").why


def test_what_an_alias_stands_for_is_changed_in_one_place_alone(load_text):
    text = "rewards:\n  a: &a {reward: math, tag_included: &t [x, y]}\n  b: *a\n  c: {reward: math, tag_included: *t}\n"
    config = load_text(MINIMAL + text, "rewards.a.tag_included.0=z", "rewards.b.timeout=7").config
    assert [config.rewards[name].tag_included for name in "abc"] == [("z", "y"), ("x", "y"), ("x", "y")]
    assert [config.rewards[name].timeout == 7 for name in "abc"] == [False, True, False]
    made = load_text(MINIMAL, "rewards={a: &a {reward: math, kwargs: {x: 1}}, b: *a}", "rewards.a.kwargs.x=2").config
    assert [made.rewards[name].kwargs["x"] for name in "ab"] == [2, 1]


def test_what_is_wrong_at_an_alias_is_named_at_each_place(load_text):
    text = MINIMAL + "rewards:\n  a: &a {reward: math, kwargs: {x: '${nowhere}'}}\n  b: *a\n"
    assert [finding.path for finding in findings_of(load_text, text)] == ["rewards.a.kwargs.x", "rewards.b.kwargs.x"]


def test_a_key_in_digits_is_a_name():
    parsed = parse_yaml("grid: {0: W, -1: x, 0x1F: y}\n", "f.yaml")
    assert (parsed.value, parsed.findings) == ({"grid": {"0": "W", "-1": "x", "0x1F": "y"}}, [])
    assert parsed.places["grid.0"] == "f.yaml:1"
    assert parse_yaml("seed: &n 7\ngrid: {*n : x}\n", "f.yaml").value == {"seed": 7, "grid": {"7": "x"}}
