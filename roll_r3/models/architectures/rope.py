"""The rotary position embedding of a config.json: which kinds of it are built, and by which library."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from roll_r3.models.architectures.fields import (
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
"""Kind -> the libraries that build it. `dynamic` and `longrope` are missing: their frequencies follow from the lengths
in one batch, which a rollout and a trainer do not share."""

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
"""Inner fields of `rope_parameters` and `rope_scaling`. One that the kind does not use has no effect."""


def rope_settings(config: RawConfig) -> Mapping[str, Any]:
    """The settings of the rotary embedding; empty: plain.

    `rope_parameters` is the name of transformers 5. Where the older name stands too, transformers reads that one.
    """
    return config.get("rope_scaling") or config.get("rope_parameters") or {}


def rope_refusals(kinds: RopeTypes, config: RawConfig) -> list[Refusal]:
    """The settings of the rotary embedding that some library does not build.

    Args:
        kinds: what the architecture builds.
    """
    rope = rope_settings(config)
    if nested := [name for name, value in rope.items() if isinstance(value, Mapping)]:
        return [Refusal(f"its rope settings differ from layer to layer ({', '.join(nested)}), which is not built")]
    kind = rope.get("rope_type") or rope.get("type") or "default"
    found = [Refusal(f"in its rope settings {refused.reason}", refused.by) for refused in _SCALED.refusals(rope)]
    if missing := ALL - kinds.get(kind, frozenset()):
        built = [name for name, by in kinds.items() if by >= missing]
        found.append(Refusal(f"rope type {kind!r} is not built, only {' and '.join(built)}", missing))
    return found


def unknown_rope(config: RawConfig) -> list[str]:
    """`name = value` of each rope setting that roll_r3 does not know."""
    return [f"rope_parameters.{text}" for text in _SCALED.unknown(rope_settings(config))]


def rotary_arguments(config: HfConfig) -> dict[str, Any]:
    """Arguments of megatron's GPTModel for a plain rotary embedding."""
    return {"position_embedding_type": "rope", "rotary_base": config.rope_parameters["rope_theta"]}
