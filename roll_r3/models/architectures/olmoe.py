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
    all_layers,
    softmax_router,
    top_one_refusals,
)
from roll_r3.models.architectures.hf_fields import ALL, ENGINES, SGLANG, TRANSFORMERS, Fields, off, only


def _megatron(config: HfConfig) -> dict[str, Any]:
    return {
        "num_moe_experts": config.num_experts,
        "moe_ffn_hidden_size": config.intermediate_size,
        # megatron's own would sum the gradients of these norms over tensor-parallel ranks with different parts
        "qk_layernorm": False,
        **softmax_router(config, renormalised=config.norm_topk_prob),
    }


FIELDS = Fields(
    read=frozenset({"num_experts", "num_local_experts"}),
    only={
        "attention_bias": off(by=ALL - TRANSFORMERS),
        "clip_qkv": off(by=ALL - TRANSFORMERS),
        "norm_topk_prob": off(by=ENGINES),
        "rms_norm_eps": only(1e-5, by=ENGINES),
        "tie_word_embeddings": off(by=SGLANG),  # its output layer would have no weights
    },
)

OLMOE = Architecture(
    model_type="olmoe",
    moe_layers=all_layers,
    num_experts=("num_experts", "num_local_experts"),
    megatron=_megatron,
    layer_names={**NORMS, **ATTENTION, **QK_NORM, **MOE},
    tiny={
        "olmoe": {"num_key_value_heads": 4, "intermediate_size": 32, "num_experts": 16, "norm_topk_prob": False},
    },
    router_class="OlmoeTopKRouter",
    gates="softmax",
    fields=FIELDS,
    refuses=lambda config: top_one_refusals(config, renormalised=bool(config.get("norm_topk_prob"))),
    whole_qk_norm=True,
)
