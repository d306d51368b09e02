"""Epsilon of transformers' latent norms, set as in every other library."""

from __future__ import annotations

from typing import Any

LATENT_NORMS = ("q_a_layernorm", "kv_a_layernorm")
"""Norms of multi-head latent attention: of low-rank queries, and of low-rank keys and values."""


def set_latent_epsilon(model: Any) -> None:
    """Set the epsilon of latent norms of a ...ForCausalLM to `rms_norm_eps`, if it has such norms.

    transformers always uses 1e-6. Megatron, SGLang and vLLM use `rms_norm_eps`, and a rollout and a trainer must
    compute one policy.
    """
    for layer in model.model.layers:
        for name in LATENT_NORMS:
            norm = getattr(layer.self_attn, name, None)
            if norm is not None:
                assert hasattr(norm, "variance_epsilon"), f"{type(norm).__name__} keeps its epsilon under another name"
                norm.variance_epsilon = model.config.rms_norm_eps
