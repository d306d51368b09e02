"""What has to be known of an architecture, and the tables that most of them share.

Only data and arithmetic: no engine and no weights are needed to read it.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from roll_r3.models.architectures.fields import (
    ALL,
    COMMON,
    MEGATRON,
    Builder,
    Fields,
    Refusal,
    shown,
)
from roll_r3.models.architectures.fields import RawConfig as RawConfig  # read by many beside its fields
from roll_r3.models.architectures.rope import ROPE_TYPES, RopeTypes, rope_refusals, rotary_arguments, unknown_rope

HfConfig = Any
"""The `transformers` configuration of a checkpoint, with its defaults filled in."""
Names = dict[str, tuple[str, ...]]
GateKind = Literal["softmax", "softmax renormalised", "sigmoid"]
"""Gates of the chosen experts: their part of the softmax over all, renormalised by `norm_topk_prob` or always; or
sigmoids with a scale."""


@dataclass(frozen=True)
class Architecture:
    """One `model_type`: where it routes, how megatron-core builds it, and what its weights are called."""

    model_type: str
    moe_layers: Callable[[RawConfig], tuple[int, ...]]
    """Global indices of the layers that route, ascending."""
    num_experts: tuple[str, ...]
    """Names under which config.json gives the routed experts of a layer; transformers 5 renamed some."""
    megatron: Callable[[HfConfig], dict[str, Any]]
    """Fields of megatron's (MLA)TransformerConfig that every layout shares; `moe_layer_freq` is filled in elsewhere."""
    layer_names: Names
    """Parameter of one decoder layer -> its parts in the checkpoint's layer. The keys are megatron's names of its
    plain PyTorch layers, with an expert's number at the end (`mlp.experts.linear_fc1.weight7`) left out; `{}` in a
    value is that number. The parts of `linear_qkv` and `linear_fc1` are interleaved and stacked by mbridge."""
    tiny: Mapping[str, Mapping[str, Any]]
    """Configurations of tiny models for tests, by name; what `TINY` gives need not be said again."""
    router_class: str
    """The class of transformers' router."""
    gates: GateKind
    """The formula of that router's gates."""
    fields: Fields
    """The account of its config.json, beyond `COMMON`."""
    refuses: Callable[[RawConfig], list[Refusal]] = lambda config: []
    """Settings that are not built and that more than one field decides; see `unbuildable`."""
    rope_types: RopeTypes = field(default_factory=lambda: ROPE_TYPES)
    gpt_model: Callable[[HfConfig], dict[str, Any]] = rotary_arguments
    """Arguments of megatron's GPTModel that follow from the checkpoint, beyond sizes."""
    optional: Mapping[str, Callable[[RawConfig], bool]] = field(default_factory=dict)
    """Keys of `layer_names` that only some checkpoints have, and which do."""
    latent_attention: bool = False
    """Multi-head latent attention: keys and values through a low-rank projection."""
    whole_qk_norm: bool = False
    """The norms of Q and K span all heads of a token, not each head alone."""

    def has(self, name: str, config: RawConfig) -> bool:
        """Tell if a checkpoint with this config.json has the parameter `name` of `layer_names`."""
        wanted = self.optional.get(name)
        return name in self.layer_names and (wanted is None or wanted(config))


TOP_NAMES: Names = {
    "embedding.word_embeddings.weight": ("model.embed_tokens.weight",),
    "decoder.final_layernorm.weight": ("model.norm.weight",),
    "output_layer.weight": ("lm_head.weight",),
}
"""Parameters outside the layers: the same in every architecture here."""

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
    """Names of the expert that sees every token, `name` in the checkpoint."""
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
"""What tiny models have in common: about half a million parameters."""


MAX_SIZE = 1 << 40
"""Largest number that is read of a config.json: far beyond any model, and products of them are still no infinity."""


def whole_number(config: RawConfig, name: str, *, least: int = 1, most: int = MAX_SIZE) -> int:
    """A number of a config.json. Raises KeyError where it is missing, ValueError where it is none, or out of bounds."""
    value = config[name]
    if type(value) is not int or value < least:  # a bool is no number
        raise ValueError(f"{name} is {shown(value)}")
    if value > most:
        raise ValueError(f"{name} is {shown(value)}, at most {most} are possible")
    return value


def whole_number_or(config: RawConfig, name: str, default: int, *, least: int = 1) -> int:
    """As `whole_number`; the default where the field is missing."""
    return whole_number(config, name, least=least) if name in config else default


def layer_numbers(config: RawConfig, name: str) -> frozenset[int]:
    """The layers that a list of a config.json names; none where it is missing or null. Raises ValueError for what is no
    list of numbers from 0 on."""
    value = config.get(name)
    if value is None:
        return frozenset()
    if not isinstance(value, list) or any(type(layer) is not int or layer < 0 for layer in value):
        raise ValueError(f"{name} is {shown(value)}, which is no list of layers")
    return frozenset(value)


def all_layers(config: RawConfig) -> tuple[int, ...]:
    """Every layer routes."""
    return tuple(range(config["num_hidden_layers"]))


def softmax_router(config: HfConfig, *, renormalised: bool) -> dict[str, Any]:
    """A softmax over all experts, top-k of it; `renormalised`: the chosen gates sum to 1.

    Renormalising the chosen ones of a softmax is a softmax over the chosen ones: megatron's order after top-k.
    """
    return {
        "moe_router_topk": config.num_experts_per_tok,
        "moe_router_score_function": "softmax",
        "moe_router_pre_softmax": not renormalised,
    }


def top_one_refusals(config: RawConfig, *, renormalised: bool) -> list[Refusal]:
    """A softmax that is renormalised over one expert: megatron-core refuses it, for its gate is always 1."""
    if not renormalised or config.get("num_experts_per_tok") != 1:
        return []
    return [
        Refusal(
            "num_experts_per_tok is 1 with gates that are renormalised: each is 1, which trains no router", MEGATRON
        )
    ]


def unbuildable(architecture: Architecture, config: RawConfig, builders: Collection[Builder] = ALL) -> list[str]:
    """Reasons why these libraries cannot build a checkpoint with this config.json; empty if they can."""
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
    """`name = value` of each field of a config.json that roll_r3 does not know."""
    try:
        return [*(COMMON | architecture.fields).unknown(config), *unknown_rope(config)]
    except (TypeError, ValueError, AttributeError):  # rope settings of another type, which `unbuildable` names
        return []
