"""OLMoE: Q and K are normalised over all heads at once, gates are not renormalised after top-k."""

from __future__ import annotations

from typing import Any

from roll_r3.models.architectures.base import (
    ATTENTION,
    MOE,
    NORMS,
    QK_NORM,
    Architecture,
    HfConfig,
    RawConfig,
    all_layers,
    refuse,
    softmax_router,
)


def _megatron(config: HfConfig) -> dict[str, Any]:
    return {
        "num_moe_experts": config.num_experts,
        "moe_ffn_hidden_size": config.intermediate_size,
        # megatron's own would sum the gradients of these norms over tensor-parallel ranks, which hold different parts
        "qk_layernorm": False,
        **softmax_router(config, renormalised=config.norm_topk_prob),
    }


def _refuses(config: RawConfig) -> list[str]:
    return refuse(clip_qkv=config.get("clip_qkv"), attention_bias=config.get("attention_bias"))


OLMOE = Architecture(
    model_type="olmoe",
    moe_layers=all_layers,
    num_experts=("num_experts", "num_local_experts"),
    megatron=_megatron,
    layer_names={**NORMS, **ATTENTION, **QK_NORM, **MOE},
    tiny={
        "olmoe": {"num_key_value_heads": 4, "intermediate_size": 32, "num_experts": 16, "norm_topk_prob": False},
    },
    refuses=_refuses,
    whole_qk_norm=True,
)
