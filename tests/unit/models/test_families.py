"""Models without support, by config.json and by name."""

from __future__ import annotations

import pytest

from roll_r3.models import families
from roll_r3.models.architectures import ARCHITECTURES
from roll_r3.models.families import _NAMES, FAMILIES, untrainable, untrainable_by_name
from roll_r3.models.known import known_configs


@pytest.mark.parametrize(
    ("name", "label"),
    [
        ("Qwen/Qwen2.5-7B-Instruct", "Qwen2 is dense"),
        ("Qwen/Qwen2.5-0.5B", "Qwen2 is dense"),
        ("Qwen/Qwen3-1.7B-Base", "Qwen3 is dense"),
        ("qwen/qwen3-8b", "Qwen3 is dense"),
        ("Qwen/Qwen3-Next-80B-A3B-Instruct", "Qwen3-Next is an MoE family"),
        ("Qwen/Qwen3.5-35B-A3B", "Qwen3.5-MoE puts a text model"),
        ("Qwen/Qwen3.5-2B", "Qwen3.5 puts a text model"),
        ("Qwen/Qwen3-VL-30B-A3B-Instruct", "Qwen3-VL-MoE puts a text model"),
        ("Qwen/Qwen3-VL-4B-Thinking", "Qwen3-VL puts a text model"),
        ("Qwen/Qwen2.5-VL-7B-Instruct", "Qwen2.5-VL puts a text model"),
        ("Qwen/Qwen3-Omni-30B-A3B-Thinking", "Qwen3-Omni puts a text model"),
        ("deepseek-ai/DeepSeek-R1-Distill-Qwen-7B", "Qwen2 is dense"),
        ("deepseek-ai/DeepSeek-V3.2-Exp", "DeepSeek-V3.2 is an MoE family"),
        ("zai-org/GLM-4.5V", "GLM-4.5V puts a text model"),
        ("zai-org/GLM-4.7-Flash", "GLM-4.7-Flash is an MoE family"),
        ("zai-org/GLM-4.5-Air", "GLM-4.5 to 4.7 is an MoE family"),
        ("openai/gpt-oss-20b", "gpt-oss is an MoE family"),
        ("meta-llama/Llama-3.2-11B-Vision-Instruct", "Llama 3.2 Vision puts a text model"),
        ("meta-llama/Llama-3.1-8B-Instruct", "Llama is dense"),
        ("moonshotai/Kimi-K2.5", "Kimi K2.5 puts a text model"),
        ("moonshotai/Kimi-K2-Instruct", "Kimi K2 is an MoE family"),
    ],
)
def test_a_publishers_name_is_certain(name, label):
    guess = untrainable_by_name(name)
    assert guess is not None
    assert guess.certain
    assert guess.reason.startswith(label)


@pytest.mark.parametrize("name", ["virtuoussy/Qwen2.5-7B-Instruct-RLVR", "/data/models/Qwen3-8B/", "Qwen3-8B"])
def test_someone_elses_name_is_only_a_guess(name):
    guess = untrainable_by_name(name)
    assert guess is not None
    assert not guess.certain


@pytest.mark.parametrize(
    "name", ["Qwen/Qwen3-30B-A3B-Base", "Qwen/Qwen3-Coder-480B-A35B-Instruct", "Qwen/Qwen2-57B-A14B", "a/b", ""]
)
def test_a_trainable_name_gives_no_guess(name):
    assert untrainable_by_name(name) is None


def test_names_and_configs_of_the_table_agree():
    """Every model in the bundled table: no name refuses what its config.json allows."""
    for name, config in known_configs().items():
        assert (untrainable_by_name(name) is None) == (untrainable(config) == ""), name


def test_every_name_leads_to_a_family():
    assert {model_type for _, _, model_type in _NAMES} <= set(FAMILIES)


def test_a_supported_architecture_is_not_refused(monkeypatch):
    monkeypatch.setattr(families, "ARCHITECTURES", {**ARCHITECTURES, "gpt_oss": None})
    assert untrainable({"model_type": "gpt_oss"}) == ""
    assert untrainable_by_name("openai/gpt-oss-20b") is None
