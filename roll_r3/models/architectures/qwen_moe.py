"""Qwen3-MoE and Qwen2-MoE (Qwen1.5-MoE): softmax router, dense layers anywhere; Qwen2 has a gated shared expert."""

from __future__ import annotations

from typing import Any

from roll_r3.models.architectures.base import (
    ATTENTION,
    DENSE_MLP,
    MOE,
    NORMS,
    QK_NORM,
    QKV_BIAS,
    Architecture,
    HfConfig,
    RawConfig,
    all_layers,
    layer_numbers,
    read_integer_or,
    shared_expert,
    softmax_router,
    top_one_refusals,
)
from roll_r3.models.architectures.hf_fields import MEGATRON, SGLANG, VLLM, Fields, Refusal, off, only


def _moe_layers(config: RawConfig) -> tuple[int, ...]:
    step, dense = read_integer_or(config, "decoder_sparse_step", 1), layer_numbers(config, "mlp_only_layers")
    return tuple(i for i in all_layers(config) if i not in dense and (i + 1) % step == 0)


def _moe(config: HfConfig) -> dict[str, Any]:
    return {
        "num_moe_experts": config.num_experts,
        "moe_ffn_hidden_size": config.moe_intermediate_size,
        **softmax_router(config, renormalised=config.norm_topk_prob),
    }


def _qwen3(config: HfConfig) -> dict[str, Any]:
    return {**_moe(config), "qk_layernorm": True}


def _qwen2(config: HfConfig) -> dict[str, Any]:
    return {
        **_moe(config),
        "add_qkv_bias": config.qkv_bias,
        "moe_shared_expert_intermediate_size": config.shared_expert_intermediate_size,
        "moe_shared_expert_gate": True,
    }


def _refuses(config: RawConfig) -> list[Refusal]:
    return top_one_refusals(config, renormalised=bool(config.get("norm_topk_prob")))


_FIELDS = Fields(
    read=frozenset({"num_experts", "num_local_experts", "moe_intermediate_size", "norm_topk_prob"}),
    inert=dict.fromkeys(("sliding_window", "max_window_layers"), "it is read with use_sliding_window, which is off"),
    only={
        # SGLang builds every layer with experts, and a tied output layer without weights
        "mlp_only_layers": off(by=SGLANG),
        "decoder_sparse_step": only(1, by=SGLANG),
        "tie_word_embeddings": off(by=SGLANG),
    },
)
QWEN3_FIELDS = _FIELDS | Fields(only={"attention_bias": off(by=MEGATRON | VLLM)})
QWEN2_FIELDS = _FIELDS | Fields(read=frozenset({"qkv_bias", "shared_expert_intermediate_size"}))

_TINY = {
    "head_dim": 16,
    "moe_intermediate_size": 32,
    "num_experts": 16,
    "norm_topk_prob": True,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
}

QWEN3_MOE = Architecture(
    model_type="qwen3_moe",
    moe_layers=_moe_layers,
    num_experts=("num_experts", "num_local_experts"),
    megatron=_qwen3,
    layer_names={**NORMS, **ATTENTION, **QK_NORM, **DENSE_MLP, **MOE},
    tiny={"qwen3_moe": _TINY, "qwen3_moe_mixed": {**_TINY, "mlp_only_layers": [2]}},
    router_class="Qwen3MoeTopKRouter",
    gates="softmax",
    fields=QWEN3_FIELDS,
    refuses=_refuses,
)

QWEN2_MOE = Architecture(
    model_type="qwen2_moe",
    moe_layers=_moe_layers,
    num_experts=("num_experts", "num_local_experts"),
    megatron=_qwen2,
    layer_names={
        **NORMS,
        **ATTENTION,
        **QKV_BIAS,
        **DENSE_MLP,
        **MOE,
        **shared_expert("shared_expert"),
        "mlp.shared_experts.gate_weight": ("mlp.shared_expert_gate.weight",),
    },
    tiny={
        "qwen2_moe": {
            **{name: value for name, value in _TINY.items() if name != "head_dim"},
            "norm_topk_prob": False,
            "shared_expert_intermediate_size": 64,
        }
    },
    router_class="Qwen2MoeTopKRouter",
    gates="softmax",
    fields=QWEN2_FIELDS,
    refuses=_refuses,
    optional={"self_attention.linear_qkv.bias": lambda config: bool(config.get("qkv_bias", True))},
)
