"""Memory of each tensor of a checkpoint in a transformers model."""

from __future__ import annotations

import torch

from roll_r3.models.architectures.base import Architecture
from roll_r3.models.hf.tensor_parts import parts_of


def tensors_by_name(model: torch.nn.Module, architecture: Architecture) -> dict[str, torch.Tensor]:
    """Return name in the checkpoint -> the model's memory. A tied output layer has no name of its own."""
    state = model.state_dict(keep_vars=True)
    if state["lm_head.weight"] is state["model.embed_tokens.weight"]:
        del state["lm_head.weight"]
    return {
        part: tensor.data[index]
        for name, tensor in state.items()
        for part, index in parts_of(name, tensor.shape, architecture)
    }
