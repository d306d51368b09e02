"""Description of an architecture, and tables shared by most of them.

Only data and arithmetic, without engines and weights.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from roll_r3.models.architectures.hf_fields import (
    ALL,
    COMMON,
    MEGATRON,
    Builder,
    Fields,
    Refusal,
    shown,
)
from roll_r3.models.architectures.hf_fields import RawConfig as RawConfig  # re-exported
from roll_r3.models.architectures.rope import ROPE_TYPES, RopeTypes, rope_refusals, rotary_arguments, unknown_rope

HfConfig = Any
"""`transformers` configuration of a checkpoint, with defaults filled in."""
Names = dict[str, tuple[str, ...]]
GateKind = Literal["softmax", "softmax renormalised", "sigmoid"]
"""Gates of the chosen experts: from a softmax over all experts, renormalised by `norm_topk_prob` or always; or scaled
sigmoids."""


@dataclass(frozen=True)
class Architecture:
    """Architecture of one `model_type`: its MoE layers, its build in megatron-core, and the names of its weights."""

    model_type: str
    moe_layers: Callable[[RawConfig], tuple[int, ...]]
    """Global indices of the MoE layers, ascending."""
    num_experts: tuple[str, ...]
    """Field names of the number of routed experts of a layer; transformers 5 renamed some."""
    megatron: Callable[[HfConfig], dict[str, Any]]
    """Fields of megatron's (MLA)TransformerConfig shared by all layouts; `moe_layer_freq` is set elsewhere."""
    layer_names: Names
    """Parameter of a decoder layer -> its parts in the checkpoint's layer.

    Keys are megatron's names of its plain PyTorch layers, without an expert's number at the end (7 in
    `mlp.experts.linear_fc1.weight7`); `{}` in a value is this number. mbridge interleaves the parts of `linear_qkv` and
    stacks those of `linear_fc1`.
    """
    tiny: Mapping[str, Mapping[str, Any]]
    """Configurations of tiny models for tests, by name, beyond `TINY`."""
    router_class: str
    """Class of transformers' router."""
    gates: GateKind
    """Formula of its gates."""
    fields: Fields
    """Known fields of its config.json, beyond `COMMON`."""
    refuses: Callable[[RawConfig], list[Refusal]] = lambda config: []
    """Unsupported combinations of several fields; see `unbuildable`."""
    rope_types: RopeTypes = field(default_factory=lambda: ROPE_TYPES)
    gpt_model: Callable[[HfConfig], dict[str, Any]] = rotary_arguments
    """Arguments of megatron's GPTModel from the checkpoint, except sizes."""
    optional: Mapping[str, Callable[[RawConfig], bool]] = field(default_factory=dict)
    """Optional keys of `layer_names` -> condition for their presence in a checkpoint."""
    latent_attention: bool = False
    """True for multi-head latent attention: keys and values through a low-rank projection."""
    whole_qk_norm: bool = False
    """True if the norms of Q and K span all heads of a token, not each head alone."""

    def has(self, name: str, config: RawConfig) -> bool:
        """Return True if a checkpoint with this config.json has the parameter `name` of `layer_names`."""
        wanted = self.optional.get(name)
        return name in self.layer_names and (wanted is None or wanted(config))


TOP_NAMES: Names = {
    "embedding.word_embeddings.weight": ("model.embed_tokens.weight",),
    "decoder.final_layernorm.weight": ("model.norm.weight",),
    "output_layer.weight": ("lm_head.weight",),
}
"""Parameters outside the layers, equal in all architectures."""

NORMS: Names = {
    "input_layernorm.weight": ("input_layernorm.weight",),
    "pre_mlp_layernorm.weight": ("post_attention_layernorm.weight",),
}
ATTENTION: Names = {
    "self_attention.linear_qkv.weight": (
        "self_attn.q_proj.weight",
        "self_attn.k_proj.weight",
        "self_attn.v_proj.weight",
    ),
    "self_attention.linear_proj.weight": ("self_attn.o_proj.weight",),
}
QKV_BIAS: Names = {
    "self_attention.linear_qkv.bias": ("self_attn.q_proj.bias", "self_attn.k_proj.bias", "self_attn.v_proj.bias"),
}
QK_NORM: Names = {
    "self_attention.q_layernorm.weight": ("self_attn.q_norm.weight",),
    "self_attention.k_layernorm.weight": ("self_attn.k_norm.weight",),
}
DENSE_MLP: Names = {
    "mlp.linear_fc1.weight": ("mlp.gate_proj.weight", "mlp.up_proj.weight"),
    "mlp.linear_fc2.weight": ("mlp.down_proj.weight",),
}
MOE: Names = {
    "mlp.router.weight": ("mlp.gate.weight",),
    "mlp.experts.linear_fc1.weight": ("mlp.experts.{}.gate_proj.weight", "mlp.experts.{}.up_proj.weight"),
    "mlp.experts.linear_fc2.weight": ("mlp.experts.{}.down_proj.weight",),
}


def shared_expert(name: str) -> Names:
    """Return the names of the shared expert, called `name` in the checkpoint."""
    return {
        "mlp.shared_experts.linear_fc1.weight": (f"mlp.{name}.gate_proj.weight", f"mlp.{name}.up_proj.weight"),
        "mlp.shared_experts.linear_fc2.weight": (f"mlp.{name}.down_proj.weight",),
    }


TINY: dict[str, Any] = {
    "num_hidden_layers": 4,
    "hidden_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 128,
    "num_experts_per_tok": 2,
    "tie_word_embeddings": False,
    "max_position_embeddings": 1024,
    "rope_theta": 10000.0,
    "initializer_range": 0.1,
}
"""Common fields of tiny models: about half a million parameters."""


MAX_SIZE = 1 << 40
"""Largest accepted number of a config.json: far beyond any model, and products of several stay finite."""


def read_integer(config: RawConfig, name: str, *, least: int = 1, most: int = MAX_SIZE) -> int:
    """Return an integer of a config.json. Raise KeyError if missing, ValueError if not an integer or out of bounds."""
    value = config[name]
    if type(value) is not int or value < least:  # a bool is not a number
        raise ValueError(f"{name} must be an integer of at least {least}, got {shown(value)}")
    if value > most:
        raise ValueError(f"{name} must be at most {most}, got {shown(value)}")
    return value


def read_integer_or(config: RawConfig, name: str, default: int, *, least: int = 1) -> int:
    """Return `read_integer`, or the default if the field is missing."""
    return read_integer(config, name, least=least) if name in config else default


def layer_numbers(config: RawConfig, name: str) -> frozenset[int]:
    """Return the layers in a list of a config.json; none if it is missing or null.

    Raises:
        ValueError: not a list of integers of at least 0.
    """
    value = config.get(name)
    if value is None:
        return frozenset()
    if not isinstance(value, list) or any(type(layer) is not int or layer < 0 for layer in value):
        raise ValueError(f"{name} must be a list of layer numbers, got {shown(value)}")
    return frozenset(value)


def all_layers(config: RawConfig) -> tuple[int, ...]:
    """Return all layers, for models with MoE layers only."""
    return tuple(range(config["num_hidden_layers"]))


def softmax_router(config: HfConfig, *, renormalised: bool) -> dict[str, Any]:
    """Return megatron's fields for the top-k of a softmax over all experts; `renormalised`: chosen gates sum to 1.

    Renormalised gates equal a softmax over the chosen experts: megatron's softmax after top-k.
    """
    return {
        "moe_router_topk": config.num_experts_per_tok,
        "moe_router_score_function": "softmax",
        "moe_router_pre_softmax": not renormalised,
    }


def top_one_refusals(config: RawConfig, *, renormalised: bool) -> list[Refusal]:
    """Return a refusal for a softmax renormalised over one expert. megatron-core rejects it: the gate is always 1."""
    if not renormalised or config.get("num_experts_per_tok") != 1:
        return []
    return [
        Refusal(
            "num_experts_per_tok is 1 with renormalised gates: every gate is 1, and the router is not trained", MEGATRON
        )
    ]


def unbuildable(architecture: Architecture, config: RawConfig, builders: Collection[Builder] = ALL) -> list[str]:
    """Return reasons why these libraries cannot build a checkpoint with this config.json; empty if they can."""
    try:
        found = [
            *architecture.refuses(config),
            *(COMMON | architecture.fields).refusals(config),
            *rope_refusals(architecture.rope_types, config),
        ]
    except (TypeError, ValueError, AttributeError, ArithmeticError) as error:  # a field of another type, or a 0
        return [f"its settings cannot be read: {error}"]
    return [refusal.reason for refusal in found if refusal.by & frozenset(builders)]


def unknown_fields(architecture: Architecture, config: RawConfig) -> list[str]:
    """Return `name = value` of each unknown field of a config.json."""
    try:
        return [*(COMMON | architecture.fields).unknown(config), *unknown_rope(config)]
    except (TypeError, ValueError, AttributeError):  # rope settings of another type, reported by `unbuildable`
        return []
