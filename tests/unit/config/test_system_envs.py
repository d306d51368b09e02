"""Environment variables of workers and engines: passed on, and never reported."""

from __future__ import annotations

import os
from typing import Any

import pytest

from roll_r3.cluster.variables import runtime_env
from roll_r3.config.findings.report import InvalidConfigError, as_json, render
from roll_r3.config.load import load_text
from roll_r3.config.reading.yaml_file import to_yaml
from roll_r3.config.rules import check_rules
from roll_r3.config.rules.example import MINIMAL
from roll_r3.config.secrets import HIDDEN, is_secret
from roll_r3.processes import variables_set

SECRET = "hf-secret-of-the-user"


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("HF_TOKEN", "x", True),
        ("WANDB_API_KEY", "x", True),
        ("AWS_ACCESS_KEY_ID", "x", True),
        ("openai_apikey", "x", True),
        ("DB_PASSWORD", "x", True),
        ("HTTP_PROXY", "http://user:word@proxy:8080", True),
        ("HTTP_PROXY", "http://proxy:8080", False),
        ("TOKENIZERS_PARALLELISM", "false", False),
        ("NCCL_DEBUG", "INFO", False),
    ],
)
def test_secrets_are_known_by_their_names(name, value, expected):
    assert is_secret(name, value) is expected


def test_a_saved_configuration_has_no_secret_and_does_not_start():
    loaded = load_text(f"{MINIMAL}system_envs: {{HF_TOKEN: {SECRET}, NCCL_DEBUG: INFO}}\n", "run.yaml")
    assert loaded.config.system_envs == {"HF_TOKEN": SECRET, "NCCL_DEBUG": "INFO"}
    saved = to_yaml(loaded.config)
    assert SECRET not in saved
    again = load_text(saved, "config.yaml").config
    assert again.system_envs == {"HF_TOKEN": HIDDEN, "NCCL_DEBUG": "INFO"}
    assert [(f.rule, "HF_TOKEN" in f.why) for f in check_rules(again)] == [("hidden-variables", True)]


@pytest.mark.parametrize(
    ("text", "overrides"),
    [
        ("system_envs: {HF_TOKEN: 71717171}\n", ()),
        ("system_envs: {HF_TOKEN: [71717171]}\n", ()),
        ("system_envs: 71717171\n", ()),
        ("system_envs: {HF_TOKEN: !!python/name:x 71717171}\n", ()),
        ("system_envs: {RAY_AUTH_TOKEN: '71717171'}\n", ()),
        ("", ("system_envs.HF_TOKEN=71717171",)),
        ("", ("system_envs.HF_TOKEN = 71717171",)),
        ("", ("system_envs.HF_TOKEN.a=71717171",)),
        ("system_envs: [a]\n", ("system_envs.HF_TOKEN=71717171",)),
        ("", ("system_envs={HF_TOKEN: 71717171",)),
        ("", ("actor_train.system_envs={HF_TOKEN: 71717171}",)),
        ("", ("rewards.judge={judge_api_key: 71717171}",)),
        ("rewards: {a: {reward: llm_judge, judge: {base_url: http://a/v1, model: m, api_key_env: sk-71717171}}}\n", ()),
        ("rewards: {a: {reward: llm_judge, judge: {base_url: 'http://me:71717171@a/v1', model: m}}}\n", ()),
        ("", ("rewards={a: {reward: llm_judge, judge: {base_url: 'http://me:71717171@a/v1', model: m}}}",)),
    ],
)
def test_no_finding_shows_a_value(text, overrides):
    try:
        loaded = load_text(MINIMAL + text, "run.yaml", overrides)
        findings, origins = [*loaded.findings, *check_rules(loaded.config)], loaded.origins
    except InvalidConfigError as error:
        findings, origins = list(error.findings), error.origins
    assert any(finding.severity == "error" for finding in findings)
    shown = render(findings, origins) + str(as_json(findings, origins))
    assert "71717171" not in shown


def test_an_override_of_another_field_is_shown_as_typed():
    loaded = load_text(MINIMAL, "run.yaml", ["actor_train.training_args.learning_rate=fast"])
    assert "override actor_train.training_args.learning_rate=fast" in render(loaded.findings, loaded.origins)


def test_ray_gets_no_secret_and_the_programs_own_variables_win():
    given = {"HF_TOKEN": SECRET, "NCCL_DEBUG": "INFO", "OMP_NUM_THREADS": "9"}
    assert runtime_env(given, {"OMP_NUM_THREADS": "1"}) == {"env_vars": {"NCCL_DEBUG": "INFO", "OMP_NUM_THREADS": "1"}}
    assert runtime_env({"HF_TOKEN": SECRET}) == {}


def test_variables_last_for_a_block(monkeypatch):
    monkeypatch.setenv("DEMO_A", "before")
    monkeypatch.delenv("DEMO_B", raising=False)
    seen: dict[str, Any] = {}
    with variables_set({"DEMO_A": "1", "DEMO_B": "2"}):
        seen = {name: os.environ[name] for name in ("DEMO_A", "DEMO_B")}
    assert seen == {"DEMO_A": "1", "DEMO_B": "2"}
    assert (os.environ["DEMO_A"], "DEMO_B" in os.environ) == ("before", False)


def test_keys_and_passwords_in_the_fields_of_a_judge_are_not_shown():
    judge = "{base_url: http://a/v1, model: m, api_key_env: sk-71717171}"
    override = "rewards.b={reward: llm_judge, judge: {base_url: 'http://user:71717171@a/v1', model: m}}"
    loaded = load_text(f"{MINIMAL}rewards: {{a: {{reward: math, judge: {judge}}}}}\n", "run.yaml", [override])
    findings = list(check_rules(loaded.config))
    assert {"judge-named", "judge-key-named", "judge-address"} <= {finding.rule for finding in findings}
    shown = render(findings, loaded.origins) + str(as_json(findings, loaded.origins))
    assert "rewards.a.judge = {'base_url': 'http://a/v1', 'model': 'm', 'api_key_env': '<hidden>'}" in shown
    assert "71717171" not in shown
