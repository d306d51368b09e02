"""The epsilon of transformers' latent norms, made that of every other library."""

from __future__ import annotations

from typing import Any

LATENT_NORMS = ("q_a_layernorm", "kv_a_layernorm")
"""Norms of multi-head latent attention, over the low-rank queries and over the low-rank keys and values."""


def set_latent_epsilon(model: Any) -> None:
    """Give the latent norms of a ...ForCausalLM the epsilon that config.json says, if it has such norms.

    transformers leaves them at 1e-6 whatever `rms_norm_eps` is. Megatron, SGLang and vLLM use `rms_norm_eps`, and a
    rollout and a trainer must compute one policy.
    """
    for layer in model.model.layers:
        for name in LATENT_NORMS:
            norm = getattr(layer.self_attn, name, None)
            if norm is not None:
                assert hasattr(norm, "variance_epsilon"), f"{type(norm).__name__} keeps its epsilon under another name"
                norm.variance_epsilon = model.config.rms_norm_eps
