"""Rotary position embedding of a config.json: supported kinds of each library."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from roll_r3.models.architectures.hf_fields import (
    ALL,
    MEGATRON,
    TRANSFORMERS,
    Builder,
    Fields,
    RawConfig,
    Refusal,
    names,
    only,
)

HfConfig = Any
RopeTypes = Mapping[str, frozenset[Builder]]

ROPE_TYPES: RopeTypes = {
    "default": ALL,
    "linear": ALL - MEGATRON,
    "llama3": ALL - MEGATRON,
    "yarn": ALL - MEGATRON,
}
"""Kind -> libraries with support for it.

`dynamic` and `longrope` are not supported: their frequencies depend on the lengths in a batch, and rollout and trainer
have different batches.
"""

_SCALED = Fields(
    read=names(
        "rope_theta rope_type type factor original_max_position_embeddings beta_fast beta_slow low_freq_factor "
        "high_freq_factor mscale mscale_all_dim"
    ),
    only={
        "partial_rotary_factor": only(1.0, None),
        "attention_factor": only(None, by=ALL - TRANSFORMERS),
        "truncate": only(True, None, by=ALL - TRANSFORMERS),
    },
)
"""Inner fields of `rope_parameters` and `rope_scaling`. Fields of another kind have no effect."""


def rope_settings(config: RawConfig) -> Mapping[str, Any]:
    """Return the settings of the rotary embedding; empty for a plain one.

    `rope_parameters` is the name in transformers 5. If the older name is there too, transformers reads the older one.
    """
    return config.get("rope_scaling") or config.get("rope_parameters") or {}


def rope_refusals(kinds: RopeTypes, config: RawConfig) -> list[Refusal]:
    """Return the unsupported settings of the rotary embedding.

    Args:
        kinds: supported kinds of the architecture.
    """
    rope = rope_settings(config)
    if nested := [name for name, value in rope.items() if isinstance(value, Mapping)]:
        return [Refusal(f"its rope settings differ from layer to layer ({', '.join(nested)}); this is not supported")]
    kind = rope.get("rope_type") or rope.get("type") or "default"
    found = [Refusal(f"in its rope settings {refused.reason}", refused.by) for refused in _SCALED.refusals(rope)]
    if missing := ALL - kinds.get(kind, frozenset()):
        built = [name for name, by in kinds.items() if by >= missing]
        found.append(Refusal(f"rope type {kind!r} is not supported, only {' and '.join(built)}", missing))
    return found


def unknown_rope(config: RawConfig) -> list[str]:
    """Return `name = value` of each unknown rope setting."""
    return [f"rope_parameters.{text}" for text in _SCALED.unknown(rope_settings(config))]


def rotary_arguments(config: HfConfig) -> dict[str, Any]:
    """Return arguments of megatron's GPTModel for a plain rotary embedding."""
    return {"position_embedding_type": "rope", "rotary_base": config.rope_parameters["rope_theta"]}
