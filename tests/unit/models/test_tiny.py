"""Tiny checkpoints: all weights differ."""

from __future__ import annotations

import pytest
from safetensors.torch import load_file

from roll_r3.models.tiny import TINY_MODELS, make_tiny_checkpoint


@pytest.mark.parametrize("name", TINY_MODELS)
def test_no_two_weights_are_equal(name, tmp_path):
    """No test would notice exchanged norms of ones or biases of zeros."""
    weights = load_file(make_tiny_checkpoint(tmp_path, name) / "model.safetensors")
    seen = {}
    for key, tensor in weights.items():
        content = tensor.flatten()[:4].tolist()
        assert seen.setdefault(tuple(content), key) == key, "two weights hold the same"
    assert all((tensor != tensor.flatten()[0]).any() for tensor in weights.values()), "a weight of one number"
