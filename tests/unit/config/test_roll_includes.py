"""Hydra's includes in ROLL's files."""

from __future__ import annotations

import pytest

from roll_r3.config.roll_yaml import include_defaults, translate


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
    assert "paste" in finding.fix
    assert list(included) == ["deepspeed_zero2"]


def test_a_block_of_the_users_own_is_not_replaced():
    data = {"defaults": ["deepspeed_zero3"], "deepspeed_zero3": {"bf16": True}}
    assert include_defaults(data, {})[0] == {"deepspeed_zero3": {"bf16": True}}


@pytest.mark.parametrize("value", [None, "x", {}, 3])
def test_defaults_of_another_form_are_left_to_the_models(value):
    assert include_defaults({"defaults": value}, {}) == ({"defaults": value}, {}, [])
