"""Checkpoints known by name, read like any other config.json."""

from __future__ import annotations

import pytest

from roll_r3.errors import ConfigError
from roll_r3.models.facts import facts_of
from roll_r3.models.known import known_config, known_configs

DENSE = {"Qwen/Qwen3-8B", "Qwen/Qwen3-4B", "Qwen/Qwen2.5-7B-Instruct", "Qwen/Qwen2.5-Math-7B"}
ROUTING = {
    "Qwen/Qwen3-30B": ("qwen3_moe", 48, 48, 128, 8),
    "Qwen/Qwen3-Coder-30B": ("qwen3_moe", 48, 48, 128, 8),
    "Qwen/Qwen3-235B": ("qwen3_moe", 94, 94, 128, 8),
    "Qwen/Qwen1.5-MoE": ("qwen2_moe", 24, 24, 60, 4),
    "Qwen/Qwen2-57B": ("qwen2_moe", 28, 28, 64, 8),
    "allenai/OLMoE": ("olmoe", 16, 16, 64, 8),
    "mistralai/Mixtral-8x7B": ("mixtral", 32, 32, 8, 2),
    "mistralai/Mixtral-8x22B": ("mixtral", 56, 56, 8, 2),
    "deepseek-ai/DeepSeek": ("deepseek_v3", 61, 58, 256, 8),
    "unsloth/DeepSeek-V3-bf16": ("deepseek_v3", 61, 58, 256, 8),
    "moonshotai/Moonlight": ("deepseek_v3", 27, 26, 64, 6),
}
"""Prefix of a name -> model type, layers, MoE layers, experts, top-k."""


@pytest.mark.parametrize("name", sorted(set(known_configs()) - DENSE))
def test_routing_of_every_moe_model(name):
    config = known_config(name)
    assert config is not None
    facts = facts_of(config)
    (expected,) = (routing for start, routing in ROUTING.items() if name.startswith(start))
    found = (facts.model_type, facts.num_layers, len(facts.moe_layers), facts.num_experts, facts.top_k)
    assert found == expected
    assert facts.moe_layers[-1] == facts.num_layers - 1


@pytest.mark.parametrize("name", sorted(DENSE))
def test_a_dense_model_is_known_and_named(name):
    config = known_config(name)
    assert config is not None
    with pytest.raises(ConfigError, match=r"'qwen[23]': Qwen[23] is dense"):
        facts_of(config)


@pytest.mark.parametrize("name", ["output/tiny/qwen3_moe", "Qwen3-30B-A3B", "qwen/qwen3-30b-a3b", ""])
def test_any_other_name_is_not_known(name):
    assert known_config(name) is None


def test_fp8_checkpoints_are_marked_as_quantized():
    quantized = {name for name in known_configs() if "quantization_config" in known_configs()[name]}
    assert quantized == {name for name in known_configs() if name.startswith("deepseek-ai/")}
