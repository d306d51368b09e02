"""Mixtral: MoE in every layer, no Q/K norm, no shared expert; weights have the names of the first release."""

from __future__ import annotations

from typing import Any

from roll_r3.models.architectures.base import (
    ATTENTION,
    NORMS,
    Architecture,
    HfConfig,
    all_layers,
    softmax_router,
    top_one_refusals,
)
from roll_r3.models.architectures.hf_fields import SGLANG, Fields, off
from roll_r3.models.architectures.rope import ROPE_TYPES


def _megatron(config: HfConfig) -> dict[str, Any]:
    return {
        "num_moe_experts": config.num_local_experts,
        "moe_ffn_hidden_size": config.intermediate_size,
        **softmax_router(config, renormalised=True),
    }


FIELDS = Fields(
    read=frozenset({"num_local_experts", "num_experts"}),
    only={"tie_word_embeddings": off(by=SGLANG)},  # its output layer would have no weights
)

MIXTRAL = Architecture(
    model_type="mixtral",
    moe_layers=all_layers,
    num_experts=("num_local_experts",),
    megatron=_megatron,
    layer_names={
        **NORMS,
        **ATTENTION,
        "mlp.router.weight": ("block_sparse_moe.gate.weight",),
        "mlp.experts.linear_fc1.weight": (
            "block_sparse_moe.experts.{}.w1.weight",
            "block_sparse_moe.experts.{}.w3.weight",
        ),
        "mlp.experts.linear_fc2.weight": ("block_sparse_moe.experts.{}.w2.weight",),
    },
    tiny={"mixtral": {"intermediate_size": 64, "num_local_experts": 8}},
    router_class="MixtralTopKRouter",
    gates="softmax renormalised",
    fields=FIELDS,
    refuses=lambda config: top_one_refusals(config, renormalised=True),
    rope_types={kind: by if kind == "default" else by - SGLANG for kind, by in ROPE_TYPES.items()},
)
