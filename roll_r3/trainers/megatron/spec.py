"""The transformer layers to build: TransformerEngine's on a GPU if installed, else plain PyTorch ones."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    reduce_from_tensor_model_parallel_region,
)
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.multi_latent_attention import MLASelfAttention
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint

from roll_r3.trainers.megatron.attention import TorchCoreAttention


def has_transformer_engine(device: torch.device) -> bool:
    """True if layers come from TransformerEngine."""
    return device.type == "cuda" and find_spec("transformer_engine") is not None


def block_spec(
    config: TransformerConfig, vp_stage: int | None, *, transformer_engine: bool, whole_qk_norm: bool
) -> TransformerBlockSubmodules:
    """Layers of this stage.

    Args:
        transformer_engine: use its layers; else plain ones, extended for sequence-parallel norms, packed rows and CP.
        whole_qk_norm: norms of Q and K span all heads of a token.
    """
    block = get_gpt_decoder_block_spec(
        config, use_transformer_engine=transformer_engine, normalization="RMSNorm", vp_stage=vp_stage
    )
    if not transformer_engine:
        _use_local_parts(block)
    if whole_qk_norm:
        for layer in block.layer_specs:
            attention = layer.submodules.self_attention.submodules
            attention.q_layernorm = ModuleSpec(WholeNorm, {"num_heads": config.num_attention_heads})
            attention.k_layernorm = ModuleSpec(WholeNorm, {"num_heads": config.num_query_groups})
    return block


def _use_local_parts(block: TransformerBlockSubmodules) -> None:
    block.layer_norm = LocalNorm
    for layer in block.layer_specs:
        parts = layer.submodules
        attention = parts.self_attention.submodules
        attention.core_attention = TorchCoreAttention
        if parts.self_attention.module is MLASelfAttention:
            parts.self_attention.module = LocalLatentAttention
        for owner in (parts, attention):
            for name in ("input_layernorm", "pre_mlp_layernorm", "q_layernorm", "k_layernorm", "kv_layernorm"):
                if getattr(owner, name, IdentityOp) is not IdentityOp:
                    setattr(owner, name, LocalNorm)


class LocalNorm(torch.nn.RMSNorm):
    """RMSNorm; megatron sums its weight gradient over tensor-parallel ranks (its own local norm refuses that)."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **unused: Any) -> None:
        super().__init__(hidden_size, eps=eps, dtype=config.params_dtype, device=torch.cuda.current_device())
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]


class WholeNorm(torch.nn.Module):
    """RMSNorm of Q or K over all heads of a token, split over tensor-parallel ranks. [..., heads, d]"""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float, num_heads: int, **unused: Any) -> None:
        """
        Args:
            hidden_size: d, the size of one head.
            num_heads: number of heads over all tensor-parallel ranks.
        """
        super().__init__()
        tp_size = parallel_state.get_tensor_model_parallel_world_size()
        self.eps = eps
        self.width = num_heads * hidden_size
        self.weight = torch.nn.Parameter(
            torch.ones(self.width // tp_size, dtype=config.params_dtype, device=torch.cuda.current_device())
        )
        set_tensor_model_parallel_attributes(self.weight, is_parallel=True, dim=0, stride=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Normalise in fp32, as the model's own implementation does."""
        flat = x.flatten(-2).float()
        squares = flat.square().sum(-1, keepdim=True)
        # the sum over ranks, forward; and of its gradient, backward
        squares = copy_to_tensor_model_parallel_region(reduce_from_tensor_model_parallel_region(squares))
        normed = flat * torch.rsqrt(squares / self.width + self.eps)
        return (self.weight * normed.to(x.dtype)).view(x.shape)

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: Any = (), metadata: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        """Describe the parts of tensor-parallel ranks for a checkpoint; without it, megatron would assume copies."""
        return make_sharded_tensors_for_checkpoint(  # type: ignore[no-any-return]
            self.state_dict(prefix="", keep_vars=True), prefix, {"weight": 0}, sharded_offsets
        )


class LocalLatentAttention(MLASelfAttention):
    """Latent attention with whole down-projections on every tensor-parallel rank, as in TransformerEngine.

    Megatron's own plain ones are split by columns. Their gather gives each rank only its own part of the rotary key's
    gradient, although all heads share this key.
    """

    def __init__(self, config: TransformerConfig, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)
        width = config.kv_lora_rank + config.qk_pos_emb_head_dim
        self.linear_kv_down_proj = WholeLinear(config, config.hidden_size, width)
        if config.q_lora_rank is not None:
            self.linear_q_down_proj = WholeLinear(config, config.hidden_size, config.q_lora_rank)


class WholeLinear(torch.nn.Linear):
    """A whole projection on each tensor-parallel rank, applied to the rank's part of the sequence."""

    def __init__(self, config: TransformerConfig, in_features: int, out_features: int) -> None:
        device = torch.cuda.current_device()
        super().__init__(in_features, out_features, bias=False, dtype=config.params_dtype, device=device)
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, None]:  # type: ignore[override]
        """Return (product, None): megatron's linear layers return their bias beside the product."""
        return super().forward(x), None
