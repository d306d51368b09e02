"""Thousands of damaged configurations: no traceback, no executed code, no accepted violation of a rule."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from roll_r3.config.findings.report import Finding, InvalidConfigError, as_json, has_errors, render
from roll_r3.config.load import LoadedConfig, load_text
from roll_r3.config.reading.field_paths import fields_at
from roll_r3.config.reading.yaml_file import to_yaml
from roll_r3.config.rules.example import MINIMAL
from roll_r3.config.tree import overlap
from roll_r3.from_roll.roll_dialect import ROLL
from roll_r3.preflight.check import check, check_config
from roll_r3.preflight.rules import ALL_RULES
from roll_r3.preflight.rules.surroundings_rule import SurroundingsRule
from roll_r3.preflight.surroundings import elsewhere

QUICKSTART = (Path(__file__).parents[3] / "configs" / "quickstart.yaml").read_text()


def all_fields(path: str = "") -> list[str]:
    inner = [f"{path}.{name}" if path else name for name in fields_at(path)]
    return inner + [deeper for field in inner for deeper in all_fields(field)]


FIELDS = sorted(set(all_fields()))
NUMBERS = st.sampled_from([0, -1, 1, 2, 3, 7, 1 << 20, 1 << 40, 1 << 63, 10**40, 0.0, -0.5, 1e-320, 1e308, 1.5])
TEXTS = st.sampled_from(
    ["", " ", "null", "~", "1:30", "off", "R4", "range(3)", "range(0)", "list(range(0, 4, 0))", "[0,1]", "Et*2|tL",
     "\u202e\u0000x", "\U0001f600", "a\nb", "\u00e9" * 50, "x" * 5000, "__import__('os').getcwd()", "bundled:x",
     "/dev/zero", "..", "a:b:c"]
)  # fmt: skip
ODD = st.sampled_from(
    ["${seed}", "${nowhere}", "${actor_train}", "${..}", "${.}", "${}", "${a:b}", "???", "${oc.env:HOME}"]
)
PLAIN = st.none() | st.booleans() | NUMBERS | st.integers() | st.floats() | TEXTS | ODD | st.text(max_size=8)
JUNK = st.sampled_from(
    ["", ":", "- ", "{", "}", "[", "]", "&a ", "*a", "!!int ", "!!python/name:os.system ", "|\n", ">", "? ", "#", "\t",
     "\n", "'", '"', "<<: ", "%", "@", "${", "${seed}", "\x00", "\ufeff"]
)  # fmt: skip
KEYS = st.sampled_from(["mode", "0", "", "a.b", "defaults", "strategy_name", "é"]) | st.text(max_size=6)
VALUES = st.recursive(
    PLAIN, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(KEYS, inner, max_size=4), max_leaves=6
)
PATHS = st.sampled_from(FIELDS) | st.tuples(st.sampled_from(["", *FIELDS]), KEYS).map(lambda pair: ".".join(pair))


def plant(content: dict[str, Any], path: str, value: Any) -> None:
    """Put `value` at `path`, and replace anything in the way."""
    *above, last = path.split(".")
    node = content
    for key in above:
        if not isinstance(node.get(key), dict):
            node[key] = {}
        node = node[key]
    node[last] = value


def checked(text: str, overrides: tuple[str, ...] = ()) -> tuple[bool, tuple[Finding, ...]]:
    """Return (accepted, findings) of a configuration, after rendering every output for a user."""
    try:
        loaded = load_text(text, "fuzz.yaml", overrides, ROLL)
    except InvalidConfigError as error:
        refusal = error
    else:
        return _rules_checked(loaded)
    assert refusal.findings
    assert str(refusal)
    json.dumps(as_json(refusal.findings, refusal.origins), allow_nan=False)
    return False, refusal.findings


def _rules_checked(loaded: LoadedConfig) -> tuple[bool, tuple[Finding, ...]]:
    findings = check(loaded, elsewhere(loaded.config))
    assert render(findings, loaded.origins)
    json.dumps(as_json(findings, loaded.origins), allow_nan=False)
    if has_errors(findings):
        return False, findings
    again = load_text(to_yaml(loaded.config), "printed.yaml")
    assert again.config == loaded.config, "what is printed is what was read"
    assert not has_errors(check_config(again.config, elsewhere(again.config))), "what passes breaks no rule"
    return True, findings


@settings(max_examples=900, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(base=st.sampled_from([MINIMAL, QUICKSTART]), changes=st.lists(st.tuples(PATHS, VALUES), min_size=1, max_size=5))
def test_any_value_in_any_place_is_accepted_or_named(base, changes):
    content = yaml.safe_load(base)
    for path, value in changes:
        plant(content, path, copy.deepcopy(value))
    accepted, findings = checked(yaml.safe_dump(content, allow_unicode=True))
    assert accepted or all(finding.why for finding in findings)


@settings(max_examples=900, deadline=None)
@given(data=st.data())
def test_a_file_that_is_damaged_anywhere_is_accepted_or_named(data):
    text = QUICKSTART
    for _ in range(data.draw(st.integers(1, 4))):
        start = data.draw(st.integers(0, len(text)))
        end = data.draw(st.integers(start, min(len(text), start + 30)))
        text = text[:start] + data.draw(JUNK | st.text(max_size=5)) + text[end:]
    checked(text)


@settings(max_examples=400, deadline=None)
@given(path=PATHS, value=VALUES)
def test_any_override_is_accepted_or_named(path, value):
    checked(MINIMAL, (f"{path}={yaml.safe_dump(value, default_flow_style=True, allow_unicode=True, width=10**6)}",))


ROLES = ("actor_train", "reference")
ERRORS = [rule for rule in ALL_RULES if rule.severity == "error" and not isinstance(rule, SurroundingsRule)]


@settings(max_examples=700, deadline=None, suppress_health_check=[HealthCheck.filter_too_much])
@given(rule=st.sampled_from(ERRORS), changes=st.lists(st.tuples(st.sampled_from(FIELDS), VALUES), max_size=4))
def test_no_mistake_elsewhere_hides_a_violation(rule, changes):
    concerned = [override.partition("=")[0] for override in rule.wrong]
    for field in (*rule.fields, *rule.depends):
        concerned += [field, *(field.replace("{role}", role) for role in ROLES), *(f"{role}.{field}" for role in ROLES)]
    concerned += ["pretrain", "actor_train.model_args"]
    # Settings of a strategy without a name have no meaning.
    concerned += [f"{role}.strategy_args.strategy_name" for role in ("actor_infer", *ROLES)]
    content = yaml.safe_load(MINIMAL)
    for path, value in changes:
        if not any(overlap(one, path) for one in concerned):
            plant(content, path, copy.deepcopy(value))
    accepted, findings = checked(yaml.safe_dump(content, allow_unicode=True), rule.wrong)
    assert not accepted
    assert rule.id in {finding.rule for finding in findings}


BOMB = "a: &a [x]\n" + "".join(
    f"{c}: &{c} [{', '.join([f'*{b}'] * 9)}]\n" for b, c in zip("abcdefghi", "bcdefghij", strict=True)
)
ATTACKS = [
    "exp_name: !!python/object/apply:os.mkdir [touched]",
    "exp_name: !!python/object/new:os.mkdir [touched]",
    "exp_name: !!python/name:os.system ''",
    "? !!python/object/apply:os.mkdir [touched]\n: x",
    "exp_name: !!python/object/apply:os.mkdir\n  args: [touched]",
    "actor_train: {device_mapping: \"__import__('os').mkdir('touched')\"}",
    "actor_train: {device_mapping: \"list(range(0, __import__('os').mkdir('touched') or 1))\"}",
    "rewards: {a: {reward: \"os:mkdir('touched')\"}}",
    "seed: ${oc.eval:\"__import__('os').mkdir('touched')\"}",
    "seed: ${oc.create:{a:1}}",
    BOMB,
    "a: &a {b: *a}",
    "a: ${b}\nb: ${a}\n",
    "a: ${a}\n",
    "a: {b: ${a}}\n",
    "a: " + "[" * 900 + "]" * 900,
    "a: " + "{b: " * 900 + "1" + "}" * 900,
    "a: " + "9" * 100_000,
    "max_steps: 0b" + "1" * 10_000,
    "max_steps: 1" + ":0" * 3_000,
    "max_steps: 1e999999999",
]  # fmt: skip


@pytest.mark.timeout(20)
@pytest.mark.parametrize("attack", ATTACKS, ids=range(len(ATTACKS)))
def test_an_attack_is_refused_and_runs_nothing(attack, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    accepted, findings = checked(attack)
    assert not accepted
    assert findings
    assert list(tmp_path.iterdir()) == []
