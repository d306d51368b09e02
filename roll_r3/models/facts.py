"""Which layers of a checkpoint are MoE, and what their routers choose from: read off its config.json, no weights."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from roll_r3.errors import ConfigError
from roll_r3.models.architectures import ARCHITECTURES


@dataclass(frozen=True)
class ModelFacts:
    """What routing needs to know of a model."""

    model_type: str
    num_layers: int
    """All decoder layers, dense ones included; multi-token-prediction layers are not counted."""
    moe_layers: tuple[int, ...]
    """Global indices (from 0) of the layers that route, ascending: axis M of every routes array."""
    num_experts: int
    """Routed experts a layer chooses from; shared experts are not counted."""
    top_k: int
    num_attention_heads: int
    vocab_size: int
    context_length: int
    """Longest sequence the position encoding was made for, in tokens."""


def read_facts(checkpoint: str | Path) -> ModelFacts:
    """Read the facts of a checkpoint directory.

    Raises:
        ConfigError: no config.json there, or an architecture that has no reader.
    """
    path = Path(checkpoint) / "config.json"
    if not path.is_file():
        raise ConfigError(f"{path} does not exist: a Hugging Face checkpoint directory holds one")
    config = json.loads(path.read_text())
    return facts_of(config)


def facts_of(config: Mapping[str, Any]) -> ModelFacts:
    """The facts in a config.json that is already read. Raises ConfigError for an unknown architecture."""
    model_type = str(config.get("model_type"))
    architecture = ARCHITECTURES.get(model_type)
    if architecture is None:
        raise ConfigError(f"model_type {model_type!r} is not known: roll_r3 trains {', '.join(sorted(ARCHITECTURES))}")
    return ModelFacts(
        model_type=model_type,
        num_layers=config["num_hidden_layers"],
        moe_layers=architecture.moe_layers(config),
        num_experts=next(config[name] for name in architecture.num_experts if name in config),
        top_k=config["num_experts_per_tok"],
        num_attention_heads=config["num_attention_heads"],
        vocab_size=config["vocab_size"],
        context_length=config["max_position_embeddings"],
    )
