"""Hydra's includes in ROLL's files."""

from __future__ import annotations

import time

import pytest

from roll_r3.config.findings.report import MAX_FINDINGS, InvalidConfigError
from roll_r3.config.rules.example import MINIMAL
from roll_r3.from_roll.includes import include_defaults
from roll_r3.from_roll.translate import translate
from tests.unit.from_roll.cases import load_text


def test_known_includes_become_markers():
    data = {
        "defaults": ["../config/deepspeed_zero3@_here_", "/x/deepspeed_zero.yaml", "config/traj_envs", "_self_"],
        "a": 1,
    }
    included, places, findings = include_defaults(data, {"defaults.0": "f.yaml:2"})
    assert findings == []
    assert included == {
        "a": 1,
        "deepspeed_zero3": {"include": "deepspeed_zero3"},
        "deepspeed_zero": {"include": "deepspeed_zero"},
    }
    assert places["deepspeed_zero3"] == "f.yaml:2"
    assert "defaults" in data
    assert translate(included, places)[0] == {"a": 1}


@pytest.mark.parametrize("entry", ["../config/my_model@_here_", "base", {"db": "mysql"}, 3, None, ["x"]])
def test_other_includes_are_refused_by_name(entry):
    included, _, (finding,) = include_defaults({"defaults": ["deepspeed_zero2", entry]}, {})
    assert finding.severity == "error"
    assert finding.found == (("defaults.1", entry),)
    assert "content" in finding.fix
    assert list(included) == ["deepspeed_zero2"]


def test_a_block_of_the_users_own_is_not_replaced():
    data = {"defaults": ["deepspeed_zero3"], "deepspeed_zero3": {"bf16": True}}
    assert include_defaults(data, {})[0] == {"deepspeed_zero3": {"bf16": True}}


@pytest.mark.parametrize("value", [None, "x", {}, 3])
def test_defaults_of_another_form_are_left_to_the_models(value):
    assert include_defaults({"defaults": value}, {}) == ({"defaults": value}, {}, [])


OURS = f"dialect: roll_r3\n{MINIMAL}"
NEEDS_AN_INCLUDE = OURS + (
    "defaults: [../config/traj_envs@_here_, ../config/deepspeed_zero3@_here_]\n"
    "response_length: ${agent_template}\n"
    "prompt_length: ${custom_env.SimpleSokoban.max_steps}\n"
    "seed: ${response_length}\n"
)


def test_what_a_skipped_include_defines_is_one_error():
    (finding,) = load_text(NEEDS_AN_INCLUDE, "run.yaml").findings
    assert (finding.rule, finding.severity) == ("roll-include", "error")
    assert [path for path, _ in finding.found] == ["defaults.0", "response_length", "prompt_length", "seed"]
    assert "../config/traj_envs@_here_" in finding.why
    assert "copy these values" in finding.fix


def test_what_no_include_of_rolls_defines_is_a_mistake_of_its_own():
    text = NEEDS_AN_INCLUDE.replace("${custom_env.SimpleSokoban.max_steps}", "${my_length}")
    findings = {f.rule: [path for path, _ in f.found] for f in load_text(text, "run.yaml").findings}
    assert findings == {"roll-include": ["defaults.0", "response_length", "seed"], "interpolation": ["prompt_length"]}


def test_an_unknown_include_is_named_with_what_needs_it():
    text = OURS + "defaults: [../config/my_model]\nresponse_length: ${my_length}\n"
    (finding,) = load_text(text, "run.yaml").findings
    assert (finding.rule, [path for path, _ in finding.found]) == ("roll-include", ["defaults.0", "response_length"])
    (alone,) = load_text(OURS + "defaults: [../config/my_model]\n", "run.yaml").findings
    assert (alone.rule, alone.path) == ("roll-include", "defaults.0")


def test_numbers_of_rolls_own_includes_resolve_and_stay_outside():
    text = OURS + "defaults: [../config/traj_envs@_here_, ../config/step_envs@_here_]\n"
    loaded = load_text(text + "response_length: ${max_tokens_per_step}\nseed: ${default_history_length}\n", "run.yaml")
    assert (loaded.config.response_length, loaded.config.seed, loaded.findings) == (128, 5, ())
    own = load_text(text + "max_actions_per_traj: 7\nseed: ${max_actions_per_traj}\n", "run.yaml")
    assert own.config.seed == 7
    assert [f.path for f in own.findings] == ["max_actions_per_traj"], "a key of the file itself stays in it"


def test_what_deepspeeds_include_defines_resolves():
    text = OURS + "defaults: [../config/deepspeed_zero3]\nhydra: ${deepspeed_zero3}\n"
    assert [f.severity for f in load_text(text, "run.yaml").findings] == ["warning"], "hydra is dropped"


def test_of_thousands_of_includes_the_first_are_named_and_all_are_counted():
    with pytest.raises(InvalidConfigError) as caught:
        load_text(OURS + "defaults: [" + "a," * 9000 + "]\n", "run.yaml")
    *named, last = caught.value.findings
    assert [finding.rule for finding in named] == ["roll-include"] * MAX_FINDINGS
    assert last.count == 9000 - MAX_FINDINGS


def test_a_long_value_is_not_searched_again_and_again():
    text = f"{OURS}a: &a '{'${nothing}' * 40_000}'\nb: [{', '.join(['*a'] * 150)}]\n"
    start = time.process_time()
    findings = load_text(f"{text}defaults: [custom]\n", "run.yaml").findings
    assert "roll-include" in {finding.rule for finding in findings}
    assert time.process_time() - start < 3
