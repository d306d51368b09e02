"""MoE layers of a checkpoint and sizes of its routers, from its config.json without weights."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from roll_r3.config.reading.disk import read_at_most, why_no_file
from roll_r3.errors import ConfigError
from roll_r3.models.architectures import ARCHITECTURES
from roll_r3.models.architectures.base import Architecture, read_integer, read_integer_or
from roll_r3.models.families import untrainable

MAX_EXPERTS = 1 << 16
"""Maximum number of experts: routes hold an expert's number in 16 bits."""
_MAX_LAYERS = 10_000
MAX_CONFIG = 16 << 20
"""Maximum bytes of a config.json."""


@dataclass(frozen=True)
class ModelFacts:
    """Facts of a model for routing."""

    model_type: str
    num_layers: int
    """All decoder layers, dense ones included; multi-token-prediction layers are not counted."""
    moe_layers: tuple[int, ...]
    """Global indices (from 0) of the MoE layers, ascending: axis M of every routes array."""
    num_experts: int
    """Routed experts of a layer; shared experts are not counted."""
    top_k: int
    num_attention_heads: int
    num_key_value_heads: int
    vocab_size: int
    context_length: int
    """Longest sequence of the position encoding, in tokens."""
    latent_attention: bool = False
    """True if keys and values come from a low-rank projection; their heads are not split on their own."""
    expert_bias: bool = False
    """True if a bias per expert is used for the choice of experts, but not in their gates."""


def read_facts(checkpoint: str | Path) -> ModelFacts:
    """Read the facts of a checkpoint directory.

    Raises:
        ConfigError: config.json cannot be read, or its architecture is unknown.
    """
    path = Path(checkpoint) / "config.json"
    if why := why_no_file(path):
        raise ConfigError(f"{path} cannot be read ({why}): a Hugging Face checkpoint directory has one")
    try:
        config = json.loads(read_at_most(path, MAX_CONFIG).decode())
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path} is not JSON: {error}") from error
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error}") from error
    if not isinstance(config, dict):
        raise ConfigError(f"{path} is not a JSON object")
    return facts_of(config)


def facts_of(config: Mapping[str, Any]) -> ModelFacts:
    """Return the facts in a config.json.

    Raises:
        ConfigError: unknown architecture, or a needed field is missing or invalid.
    """
    if reason := untrainable(config):
        raise ConfigError(f"{reason}; roll_r3 trains {', '.join(sorted(ARCHITECTURES))}")
    model_type = str(config["model_type"])
    architecture = ARCHITECTURES[model_type]
    try:
        return _facts(model_type, architecture, config)
    except (KeyError, StopIteration) as error:
        missing = error.args[0] if error.args else architecture.num_experts[0]
        raise ConfigError(f"this config.json of a {model_type} has no {missing}") from error
    except (TypeError, ValueError, ArithmeticError) as error:
        raise ConfigError(f"this config.json of a {model_type} cannot be read: {error}") from error


def _facts(model_type: str, architecture: Architecture, config: Mapping[str, Any]) -> ModelFacts:
    name = next(name for name in architecture.num_experts if name in config)
    num_layers = read_integer(config, "num_hidden_layers", most=_MAX_LAYERS)
    num_experts = read_integer(config, name, most=MAX_EXPERTS)
    heads = read_integer(config, "num_attention_heads")
    return ModelFacts(
        model_type=model_type,
        num_layers=num_layers,
        moe_layers=architecture.moe_layers(config),
        num_experts=num_experts,
        top_k=read_integer(config, "num_experts_per_tok", most=num_experts),
        num_attention_heads=heads,
        num_key_value_heads=read_integer_or(config, "num_key_value_heads", heads),
        latent_attention=architecture.latent_attention,
        expert_bias="mlp.router.expert_bias" in architecture.layer_names,
        vocab_size=read_integer(config, "vocab_size"),
        context_length=read_integer(config, "max_position_embeddings"),
    )
