"""Mixtral: every layer routes, no Q/K norm, no shared expert; its weights keep the names of the first release."""

from __future__ import annotations

from typing import Any

from roll_r3.models.architectures.base import (
    ATTENTION,
    NORMS,
    Architecture,
    HfConfig,
    RawConfig,
    all_layers,
    refuse,
    softmax_router,
)


def _megatron(config: HfConfig) -> dict[str, Any]:
    return {
        "num_moe_experts": config.num_local_experts,
        "moe_ffn_hidden_size": config.intermediate_size,
        **softmax_router(config, renormalised=True),
    }


def _refuses(config: RawConfig) -> list[str]:
    return refuse(sliding_window=config.get("sliding_window"), router_jitter_noise=config.get("router_jitter_noise"))


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
    refuses=_refuses,
)
