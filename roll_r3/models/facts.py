"""Which layers of a checkpoint are MoE, and what their routers choose from: read off its config.json, no weights.

A new architecture is one function and one row of `READERS`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from roll_r3.errors import ConfigError


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


def _all_layers(config: Mapping[str, Any]) -> tuple[int, ...]:
    return tuple(range(config["num_hidden_layers"]))


def _qwen_moe_layers(config: Mapping[str, Any]) -> tuple[int, ...]:
    step, dense = config.get("decoder_sparse_step", 1), set(config.get("mlp_only_layers") or ())
    return tuple(i for i in _all_layers(config) if i not in dense and (i + 1) % step == 0)


def _deepseek_layers(config: Mapping[str, Any]) -> tuple[int, ...]:
    first, freq = config.get("first_k_dense_replace", 0), config.get("moe_layer_freq", 1)
    return tuple(i for i in _all_layers(config) if i >= first and i % freq == 0)


@dataclass(frozen=True)
class Reader:
    """Where one architecture's config.json keeps its routing facts."""

    moe_layers: Callable[[Mapping[str, Any]], tuple[int, ...]]
    num_experts: tuple[str, ...]
    """Names that checkpoints give it; transformers 5 writes `num_local_experts` for some that used to differ."""


READERS: dict[str, Reader] = {
    "qwen3_moe": Reader(_qwen_moe_layers, ("num_experts", "num_local_experts")),
    "qwen2_moe": Reader(_qwen_moe_layers, ("num_experts", "num_local_experts")),
    "olmoe": Reader(_all_layers, ("num_experts", "num_local_experts")),
    "mixtral": Reader(_all_layers, ("num_local_experts",)),
    "deepseek_v3": Reader(_deepseek_layers, ("n_routed_experts",)),
}


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
    reader = READERS.get(model_type)
    if reader is None:
        raise ConfigError(
            f"model_type {model_type!r} is not known: routing facts are read for {', '.join(sorted(READERS))}"
        )
    return ModelFacts(
        model_type=model_type,
        num_layers=config["num_hidden_layers"],
        moe_layers=reader.moe_layers(config),
        num_experts=next(config[name] for name in reader.num_experts if name in config),
        top_k=config["num_experts_per_tok"],
        num_attention_heads=config["num_attention_heads"],
        vocab_size=config["vocab_size"],
        context_length=config["max_position_embeddings"],
    )
