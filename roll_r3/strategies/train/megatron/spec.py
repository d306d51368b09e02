"""The transformer layers to build: TransformerEngine's on a GPU that has it, plain PyTorch ones elsewhere."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import torch
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig

from roll_r3.strategies.train.megatron.attention import TorchCoreAttention


def has_transformer_engine(device: torch.device) -> bool:
    """Whether layers come from TransformerEngine."""
    return device.type == "cuda" and find_spec("transformer_engine") is not None


class LocalNorm(torch.nn.RMSNorm):
    """RMSNorm whose weight gradient megatron sums over tensor-parallel ranks (its own local norm refuses that)."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **unused: Any) -> None:
        super().__init__(hidden_size, eps=eps, dtype=config.params_dtype, device=torch.cuda.current_device())
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]


def local_block_spec(config: TransformerConfig, vp_stage: int | None = None) -> TransformerBlockSubmodules:
    """This stage's layers without TransformerEngine: they do sequence-parallel norms, packed rows and CP."""
    block = get_gpt_decoder_block_spec(config, use_transformer_engine=False, normalization="RMSNorm", vp_stage=vp_stage)
    block.layer_norm = LocalNorm
    for layer in block.layer_specs:
        parts = layer.submodules
        for name in ("input_layernorm", "pre_mlp_layernorm"):
            if getattr(parts, name) is not IdentityOp:
                setattr(parts, name, LocalNorm)
        attention = parts.self_attention.submodules
        attention.core_attention = TorchCoreAttention
        for name in ("q_layernorm", "k_layernorm"):
            if getattr(attention, name) is not IdentityOp:
                setattr(attention, name, LocalNorm)
    return block
