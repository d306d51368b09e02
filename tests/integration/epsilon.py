"""transformers' models with one epsilon in all their norms."""

from __future__ import annotations

from typing import Any


def with_one_epsilon(model: Any) -> Any:
    """Set every norm's epsilon to the configured one; transformers leaves those of latent attention at 1e-6."""
    norms = [module for module in model.modules() if hasattr(module, "variance_epsilon")]
    assert len(norms) > 2 * len(model.model.layers)
    for norm in norms:
        norm.variance_epsilon = model.config.rms_norm_eps
    return model
