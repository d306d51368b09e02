"""Output layer of transformers' models."""

from __future__ import annotations

from typing import Any

import torch


def compute_logits_in_fp32(model: Any) -> None:
    """Make the output layer of a ...ForCausalLM convert its input and weight to fp32 before their product.

    The weight is not changed and may be the embedding's; its gradient has its own dtype.

    Raises:
        TypeError: the output layer is not a plain linear layer.
    """
    head = model.lm_head
    if type(head) is not torch.nn.Linear or head.bias is not None:
        raise TypeError(f"the output layer is {head}, not a linear layer without bias")

    def forward(hidden: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.linear(hidden.float(), head.weight.float())

    head.forward = forward
