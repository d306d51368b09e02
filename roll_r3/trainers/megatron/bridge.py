"""Hugging Face weights in and out of megatron's layers: mbridge splits and merges them, our tables name them.

Megatron has two sets of parameter names, for TransformerEngine layers and for plain PyTorch ones. `PlainNames` unifies
them: plain names, with an expert's number at the end. `roll_r3.models.architectures` maps them to a checkpoint's names.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import torch
from mbridge.core import LLMBridge
from megatron.core.transformer.transformer_config import MLATransformerConfig, TransformerConfig
from transformers import AutoConfig

from roll_r3.errors import ConfigError
from roll_r3.models.architectures import ARCHITECTURES
from roll_r3.models.architectures.base import TOP_NAMES, Architecture, unbuildable
from roll_r3.models.architectures.hf_fields import MEGATRON
from roll_r3.trainers.megatron.spec import block_spec


class TableBridge(LLMBridge):
    """mbridge's conversion, with the fields and names of an `Architecture`."""

    has_vp_stage = True

    def __init__(self, architecture: Architecture, hf_config: Any, *, transformer_engine: bool, **kwargs: Any) -> None:
        self.architecture = architecture
        self.transformer_engine = transformer_engine
        super().__init__(hf_config, **kwargs)

    def _build_config(self) -> TransformerConfig:
        self.TransformerConfigClass = MLATransformerConfig if self.architecture.latent_attention else TransformerConfig
        routed = self.architecture.moe_layers(self.hf_config.to_dict())
        config: TransformerConfig = self._build_base_config(
            **self.architecture.megatron(self.hf_config),
            moe_layer_freq=[int(layer in routed) for layer in range(self.hf_config.num_hidden_layers)],
        )
        return config

    def _get_transformer_layer_spec(self, vp_stage: int | None = None) -> Any:
        return block_spec(
            self.config,
            vp_stage,
            transformer_engine=self.transformer_engine,
            whole_qk_norm=self.architecture.whole_qk_norm,
        )

    def _get_gptmodel_args(self) -> dict[str, Any]:
        return {
            "vocab_size": self.hf_config.vocab_size,
            "max_sequence_length": self.hf_config.max_position_embeddings,
            **self.architecture.gpt_model(self.hf_config),
        }

    def _weight_name_mapping_mcore_to_hf(self, mcore_weights_name: str) -> list[str]:
        if mcore_weights_name in TOP_NAMES:
            return list(TOP_NAMES[mcore_weights_name])
        found = re.fullmatch(r"decoder\.layers\.(\d+)\.(.*?)(\d*)", mcore_weights_name)
        if found is None or found[2] not in self.architecture.layer_names:
            raise ConfigError(
                f"megatron's parameter {mcore_weights_name} is missing from the table of {self.architecture.model_type}"
            )
        layer, name, expert = found.groups()
        return [f"model.layers.{layer}.{part.format(expert)}" for part in self.architecture.layer_names[name]]


def open_bridge(
    model_path: str,
    *,
    dtype: torch.dtype,
    tp_size: int,
    transformer_engine: bool,
    **overrides: Any,
) -> TableBridge:
    """Open the bridge of a checkpoint and make its TransformerConfig; needs megatron's process groups.

    Args:
        overrides: TransformerConfig fields with precedence over the checkpoint's.

    Raises:
        ConfigError: the architecture has no table, or megatron cannot build a setting of the checkpoint.
    """
    # never the checkpoint's own code: megatron builds the model, and these classes lack defaults set by transformers
    hf_config = AutoConfig.from_pretrained(model_path, trust_remote_code=False)
    architecture = ARCHITECTURES.get(hf_config.model_type)
    if architecture is None:
        raise ConfigError(
            f"{model_path} has model_type {hf_config.model_type!r}; roll_r3 trains {', '.join(sorted(ARCHITECTURES))}"
        )
    refused = unbuildable(architecture, hf_config.to_dict(), MEGATRON)
    if getattr(hf_config, "quantization_config", None) is not None:
        refused.append("its weights are quantized: convert it to bf16 first")
    if refused:
        reasons = "; ".join(refused)
        raise ConfigError(f"{model_path} ({hf_config.model_type}) cannot be built with megatron-core: {reasons}")
    if getattr(hf_config, "head_dim", None) is None:  # mbridge takes a None for a size
        hf_config.head_dim = hf_config.hidden_size // hf_config.num_attention_heads
    bridge = TableBridge(
        architecture,
        hf_config,
        dtype=dtype,
        make_vocab_size_divisible_by=tp_size,
        transformer_engine=transformer_engine,
    )
    bridge.set_extra_args(**overrides)
    return bridge


def load_weights(bridge: LLMBridge, chunks: Sequence[torch.nn.Module], model_path: str) -> None:
    """Fill the chunks from the checkpoint; collective over tensor-parallel groups."""
    with torch.no_grad():
        bridge.load_weights([PlainNames(chunk) for chunk in chunks], model_path)


class PlainNames:
    """A chunk with one set of parameter names for both kinds of layers."""

    def __init__(self, chunk: torch.nn.Module) -> None:
        model = unwrap(chunk)
        self.decoder = model.decoder
        self.config = model.config
        self._parameters = [(_plain_name(name), value) for name, value in model.named_parameters()]
        self._state = {_plain_name(name): value for name, value in model.state_dict().items() if value is not None}

    def named_parameters(self) -> list[tuple[str, torch.nn.Parameter]]:
        return self._parameters

    def state_dict(self) -> dict[str, torch.Tensor]:
        return self._state

    def expert_biases(self) -> list[tuple[str, torch.Tensor]]:
        """Buffers stored in a checkpoint."""
        return [(name, value) for name, value in self._state.items() if name.endswith(".expert_bias")]


_FUSED_NORMS = {
    "self_attention.linear_qkv.layer_norm_weight": "input_layernorm.weight",
    "self_attention.linear_q_up_proj.layer_norm_weight": "self_attention.q_layernorm.weight",
    "self_attention.linear_kv_up_proj.layer_norm_weight": "self_attention.kv_layernorm.weight",
    "mlp.linear_fc1.layer_norm_weight": "pre_mlp_layernorm.weight",
}
"""Norms fused by TransformerEngine into the following projection, and their plain names."""


def plain_norms(name: str) -> str:
    """Name of a parameter without TransformerEngine."""
    for fused, plain in _FUSED_NORMS.items():
        name = name.replace(fused, plain)
    return name


def _plain_name(name: str) -> str:
    name = plain_norms(name)
    return re.sub(r"experts\.local_experts\.(\d+)\.(linear_fc[12])\.weight", r"experts.\2.weight\1", name)


def unwrap(chunk: torch.nn.Module) -> Any:
    """The GPTModel inside megatron's wrappers."""
    inner: Any = chunk
    while hasattr(inner, "module"):
        inner = inner.module
    return inner
