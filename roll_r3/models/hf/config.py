"""Configuration of a checkpoint, as read by transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import AutoConfig

from roll_r3.errors import ConfigError
from roll_r3.models.architectures import ARCHITECTURES
from roll_r3.models.architectures.base import unbuildable
from roll_r3.models.architectures.hf_fields import TRANSFORMERS
from roll_r3.models.facts import read_facts


def read_hf_config(checkpoint: str | Path) -> Any:
    """Read the configuration of a model for transformers, with defaults filled in.

    Its class is always the library's own, never code from the checkpoint. The caller chooses the implementations of
    attention and experts. Dropout, router noise and the load-balancing loss are turned off.

    Raises:
        ConfigError: unknown architecture (see `read_facts`), unsupported settings (see `unbuildable`), or quantized
            weights.
    """
    facts = read_facts(checkpoint)
    config = AutoConfig.from_pretrained(checkpoint, trust_remote_code=False)
    if getattr(config, "quantization_config", None) is not None:
        raise ConfigError(f"{checkpoint}: its weights are quantized; convert it to bf16 first")
    if refused := unbuildable(ARCHITECTURES[facts.model_type], config.to_dict(), TRANSFORMERS):
        raise ConfigError(f"{checkpoint} ({facts.model_type}) is not built with transformers: {'; '.join(refused)}")
    # None: transformers' own choice. A name from the checkpoint could fetch and run a kernel from the hub
    config._attn_implementation = None
    config._experts_implementation = None
    config.attention_dropout = 0.0
    config.router_jitter_noise = 0.0  # Mixtral's; routes would depend on chance
    config.output_router_logits = False  # no load-balancing loss
    return config
