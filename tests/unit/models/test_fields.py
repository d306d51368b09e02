"""Known fields of config.json: no field of transformers' classes is missing, and every unsupported value is refused."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest
from transformers import AutoConfig, GenerationConfig

from roll_r3.models.architectures import ARCHITECTURES
from roll_r3.models.architectures.base import TINY, unbuildable, unknown_fields
from roll_r3.models.architectures.hf_fields import (
    ALL,
    COMMON,
    ENGINES,
    MEGATRON,
    SGLANG,
    TRANSFORMERS,
    VLLM,
    Fields,
    only,
)
from roll_r3.models.known import known_configs

PUBLISHED = {
    "qwen3_moe": "max_window_layers mlp_only_layers router_aux_loss_coef torch_dtype use_sliding_window head_dim",
    "qwen2_moe": "max_window_layers shared_expert_intermediate_size sliding_window use_sliding_window torch_dtype",
    "olmoe": "clip_qkv attention_bias rope_scaling rope_theta router_aux_loss_coef norm_topk_prob",
    "mixtral": "router_aux_loss_coef router_jitter_noise sliding_window rope_theta",
    "deepseek_v3": "auto_map ep_size moe_layer_freq num_nextn_predict_layers pretraining_tp quantization_config "
    "scoring_func topk_method seq_aux aux_loss_alpha rope_scaling n_group topk_group",
}
"""Further fields of published files."""


def config_of(name: str, **changes: Any) -> dict[str, Any]:
    """Return config.json of a tiny model, as written by transformers, with changes."""
    architecture = next(a for a in ARCHITECTURES.values() if name in a.tiny)
    fields = {**TINY, **architecture.tiny[name], "vocab_size": 260}
    return json.loads(AutoConfig.for_model(architecture.model_type, **fields).to_json_string()) | changes


def refused(name: str, builders: frozenset = ALL, **changes: Any) -> list[str]:
    config = config_of(name, **changes)
    return unbuildable(ARCHITECTURES[config["model_type"]], config, builders)


@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_every_field_of_transformers_is_known(model_type: str) -> None:
    config = AutoConfig.for_model(model_type)
    written = {name for name in config.to_dict() if not name.startswith("_")}
    names = written | set(vars(config)) | set(config.attribute_map) | {f.name for f in dataclasses.fields(config)}
    names |= set(PUBLISHED[model_type].split()) | set(GenerationConfig._get_default_generation_params())
    account = COMMON | ARCHITECTURES[model_type].fields
    assert len(names) > 60
    assert not sorted(name for name in names if name not in account and not name.startswith("_"))


@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_the_default_of_a_missing_field_is_supported(model_type: str) -> None:
    """Only written fields are checked, so transformers' default must be a supported value."""
    architecture = ARCHITECTURES[model_type]
    defaults = AutoConfig.for_model(model_type).to_dict()
    account = Fields(only=(COMMON | architecture.fields).only)
    assert account.refusals(defaults) == []


@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_a_field_is_in_one_list(model_type: str) -> None:
    account = COMMON | ARCHITECTURES[model_type].fields
    assert len(account.read) + len(account.inert) + len(account.only) == len(
        account.read | set(account.inert) | set(account.only)
    )


@pytest.mark.parametrize("name", [name for a in ARCHITECTURES.values() for name in a.tiny])
def test_tiny_models_have_known_and_supported_fields(name: str) -> None:
    config = config_of(name)
    architecture = ARCHITECTURES[config["model_type"]]
    assert unbuildable(architecture, config, MEGATRON | TRANSFORMERS | VLLM) == []
    assert unknown_fields(architecture, config) == []


@pytest.mark.parametrize("name", [n for n, c in known_configs().items() if c["model_type"] in ARCHITECTURES])
def test_published_models_are_built_by_all(name: str) -> None:
    config = known_configs()[name]
    architecture = ARCHITECTURES[config["model_type"]]
    assert unbuildable(architecture, config) == []
    assert unknown_fields(architecture, config) == []


EVERY = ("qwen3_moe", "qwen2_moe", "olmoe", "mixtral", "deepseek_v3")
NOT_TRANSFORMERS = ALL - TRANSFORMERS
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 256}
CASES: list[tuple[str, dict[str, Any], frozenset, str]] = [
    *((name, {"hidden_act": "gelu"}, NOT_TRANSFORMERS, 'hidden_act is "gelu", but Megatron, SGLang') for name in EVERY),
    *((name, {"partial_rotary_factor": 0.5}, ALL, "partial_rotary_factor is 0.5, but roll_r3") for name in EVERY),
    *(
        (name, {"rope_parameters": {"rope_theta": 1e4, "rope_type": "default", "partial_rotary_factor": 0.5}}, ALL,
         "in its rope settings partial_rotary_factor is 0.5")
        for name in EVERY
    ),
    *((name, {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}, "rope_parameters": None}, ALL, "'dynamic'")
      for name in EVERY),
    *((name, {"rope_parameters": {"full_attention": {"rope_theta": 1e4}}}, ALL, "from layer to layer")
      for name in EVERY),
    *((name, {"mlp_bias": True}, ALL, "mlp_bias is true") for name in EVERY),
    *((name, {"attn_logit_softcapping": 50.0}, ALL, "attn_logit_softcapping is 50.0") for name in EVERY),
    *((name, {"sliding_window": 128}, ALL, "sliding_window is 128, but roll_r3 builds the model without it")
      for name in ("olmoe", "mixtral", "deepseek_v3")),
    *((name, {"use_sliding_window": True}, ALL, "use_sliding_window is true") for name in ("qwen3_moe", "qwen2_moe")),
    *((name, {"tie_word_embeddings": True}, SGLANG, "tie_word_embeddings is true, but SGLang builds the model")
      for name in ("qwen3_moe", "qwen2_moe", "olmoe", "mixtral")),
    ("qwen2_moe", {"layer_types": ["full_attention", "sliding_attention"]}, ALL, "layer_types is ["),
    ("qwen3_moe", {"attention_bias": True}, MEGATRON | VLLM, "attention_bias is true, but Megatron and vLLM build"),
    ("qwen2_moe", {"attention_bias": True}, ALL, "attention_bias is true"),
    ("olmoe", {"attention_bias": True}, NOT_TRANSFORMERS, "attention_bias is true"),
    ("deepseek_v3", {"attention_bias": True}, NOT_TRANSFORMERS, "attention_bias is true"),
    ("qwen3_moe", {"rope_parameters": YARN}, MEGATRON, "rope type 'yarn' is not supported, only default"),
    ("mixtral", {"rope_parameters": YARN}, MEGATRON | SGLANG, "rope type 'yarn' is not supported"),
    ("deepseek_v3", {"rope_parameters": YARN | {"truncate": False}}, NOT_TRANSFORMERS, "truncate is false"),
    ("deepseek_v3", {"rope_parameters": YARN | {"attention_factor": 1.5}}, NOT_TRANSFORMERS, "attention_factor is 1.5"),
    ("deepseek_v3", {"rope_parameters": YARN | {"mscale": 1.0}}, ALL, "one of mscale and mscale_all_dim"),
    ("deepseek_v3", {"rope_parameters": YARN | {"rope_type": "linear"}}, ALL, "only default and yarn"),
    ("qwen3_moe", {"mlp_only_layers": [1]}, SGLANG, "mlp_only_layers is [1], but SGLang builds the model without it"),
    ("qwen2_moe", {"decoder_sparse_step": 2}, SGLANG, "decoder_sparse_step is 2, but SGLang builds the model with 1"),
    ("olmoe", {"clip_qkv": 8.0}, NOT_TRANSFORMERS, "clip_qkv is 8.0"),
    ("olmoe", {"norm_topk_prob": True}, ENGINES, "norm_topk_prob is true, but SGLang and vLLM build"),
    ("olmoe", {"rms_norm_eps": 1e-6}, ENGINES, "rms_norm_eps is 1e-06, but SGLang and vLLM build the model with 1e-05"),
    ("deepseek_v3", {"norm_topk_prob": False}, MEGATRON, "norm_topk_prob is false, but Megatron"),
    ("deepseek_v3", {"rope_interleave": False}, MEGATRON | VLLM, "rope_interleave is false"),
    ("deepseek_v3", {"scoring_func": "softmax"}, ALL, 'scoring_func is "softmax"'),
    ("deepseek_v3", {"topk_method": "greedy"}, ALL, 'topk_method is "greedy"'),
    ("deepseek_v3", {"moe_layer_freq": 2}, TRANSFORMERS, "moe_layer_freq is 2, but transformers builds the model with"),
    ("deepseek_v3", {"topk_group": 1, "num_experts_per_tok": 4}, MEGATRON, "is not 2"),
    ("deepseek_v3", {"n_group": 1, "topk_group": 1, "num_experts_per_tok": 1}, MEGATRON, "num_experts_per_tok is 1"),
    ("mixtral", {"num_experts_per_tok": 1}, MEGATRON, "num_experts_per_tok is 1"),
    ("qwen3_moe", {"num_experts_per_tok": 1}, MEGATRON, "num_experts_per_tok is 1"),
    ("olmoe", {"num_experts_per_tok": 1, "norm_topk_prob": True}, MEGATRON, "num_experts_per_tok is 1"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "changes", "by", "said"), CASES)
def test_another_value_is_refused_for_libraries_without_support(
    name: str, changes: dict[str, Any], by: frozenset, said: str
) -> None:
    for builder in ALL:
        found = [reason for reason in refused(name, frozenset({builder}), **changes) if said in reason]
        assert len(found) == (builder in by), builder


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("olmoe", {"num_experts_per_tok": 1}),
        ("qwen2_moe", {"num_experts_per_tok": 1}),
        ("qwen3_moe", {"num_experts_per_tok": 1, "norm_topk_prob": False}),
        ("qwen3_moe", {"sliding_window": 4096, "use_sliding_window": False}),
        ("mixtral", {"router_jitter_noise": 0.1, "attention_dropout": 0.1, "sliding_window": None}),
        ("qwen3_moe", {"partial_rotary_factor": 1, "attention_bias": None, "layer_types": None}),
        ("deepseek_v3", {"hidden_act": "silu", "num_nextn_predict_layers": 1, "pretraining_tp": 4}),
    ],
)
def test_a_value_without_effect_is_accepted(name: str, changes: dict[str, Any]) -> None:
    assert refused(name, **changes) == refused(name)


def test_an_unknown_field_is_named() -> None:
    rope = {"rope_theta": 1e4, "rope_type": "default", "mrope_section": [8, 4, 4]}
    config = config_of("qwen3_moe", residual_scale=0.5, note="x" * 500, rope_parameters=rope, _private=1)
    first, second, third = unknown_fields(ARCHITECTURES["qwen3_moe"], config)
    assert first == "residual_scale = 0.5"
    assert second.startswith('note = "xxx')
    assert len(second) < 150
    assert third == "rope_parameters.mrope_section = [8, 4, 4]"


@pytest.mark.parametrize("rope", [[], [1], "yarn", 3, {"rope_type": ["yarn"]}])
def test_rope_settings_of_another_type_are_a_reason(rope: object) -> None:
    config = config_of("qwen3_moe", rope_parameters=rope)
    architecture = ARCHITECTURES["qwen3_moe"]
    found = unbuildable(architecture, config) + unknown_fields(architecture, config)
    assert [text.startswith("its settings cannot be read") for text in found] == ([True] if rope else [])


def test_the_older_name_of_rope_settings_takes_precedence_as_in_transformers() -> None:
    plain, scaled = {"rope_theta": 1e4, "rope_type": "default"}, {"rope_type": "linear", "factor": 2.0}
    both = AutoConfig.for_model("qwen3_moe", rope_parameters=plain, rope_scaling=scaled)
    assert both.rope_parameters["rope_type"] == "linear"
    found = refused("qwen3_moe", MEGATRON, rope_parameters=plain, rope_scaling=scaled)
    assert found == ["rope type 'linear' is not supported, only default"]


def test_an_architectures_row_replaces_the_common_one() -> None:
    common = Fields(read=frozenset({"a", "d"}), inert={"b": "no effect"}, only={"c": only(1)})
    both = common | Fields(read=frozenset({"b", "c"}), inert={"a": "no effect"})
    assert (both.read, both.inert, dict(both.only)) == ({"b", "c", "d"}, {"a": "no effect"}, {})
