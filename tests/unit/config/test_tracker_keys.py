"""Keys of trackers are refused, and never shown."""

from __future__ import annotations

from typing import Any

import pytest

from roll_r3.config.findings.report import Origins, as_json, render
from roll_r3.config.load import load_text
from roll_r3.config.rules import check_rules
from roll_r3.config.rules.example import MINIMAL

KEY = "0123456789abcdef0123456789abcdef01234567"


@pytest.mark.parametrize(
    ("arguments", "path"),
    [
        (f"{{wandb: {{api_key: {KEY}}}}}", "wandb.api_key"),
        (f"{{wandb: {{notes: {KEY}}}}}", "wandb.notes"),
        (f"{{wandb: {{tags: [x, {KEY}]}}}}", "wandb.tags.1"),
        ("{swanlab: {login_kwargs: abc}}", "swanlab.login_kwargs"),
        ("{trackio: {hf_token: abc}}", "trackio.hf_token"),
        ("{trackio: {space_id: hf_abcdefghijklmnopqrstuvwxyz}}", "trackio.space_id"),
        ("{mlflow: {tracking_uri: 'https://me:secret@host/x'}}", "mlflow.tracking_uri"),
        ("{mlflow: {password: abc}}", "mlflow.password"),
    ],
)
def test_a_key_is_refused_by_its_name_or_its_form(arguments: str, path: str) -> None:
    overrides = ["track_with=[wandb, swanlab, trackio, mlflow]", f"tracker_kwargs={arguments}"]
    config = load_text(MINIMAL, "run.yaml", overrides).config
    [finding] = [found for found in check_rules(config) if found.rule == "tracker-keys-elsewhere"]
    assert f"tracker_kwargs.{path})" in finding.why
    shown = render([finding], Origins("run.yaml")) + str(as_json([finding], Origins("run.yaml")))
    for secret in (KEY, "abc", "secret@"):
        assert secret not in shown


@pytest.mark.parametrize(
    "arguments",
    [
        {"wandb": {"project": "moe", "tags": ["a", "b"], "group": "tokens"}},
        {"wandb": {"api_key": None, "notes": "https://example.org/x"}},
        {"mlflow": {"description": "monkey"}},
    ],
)
def test_other_arguments_are_taken(arguments: dict[str, Any]) -> None:
    config = load_text(MINIMAL, "run.yaml", ["track_with=[wandb, mlflow]"]).config
    config = config.model_copy(update={"tracker_kwargs": arguments})
    assert not [found for found in check_rules(config) if found.rule.startswith("tracker")]


@pytest.mark.parametrize(
    "override",
    ["tracker_kwargs={token: abc}", "tracker_kwargs.wandb={token: {of: abc}}", "tracker_kwargs.wandb.notes={x: abc}"],
)
def test_a_mistake_elsewhere_shows_no_value(override: str) -> None:
    loaded = load_text(MINIMAL, "run.yaml", ["track_with=[wandb]", override])
    assert loaded.findings
    shown = render(loaded.findings, loaded.origins) + str(as_json(loaded.findings, loaded.origins))
    assert "abc" not in shown
