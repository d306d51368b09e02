"""The output layer of transformers' models."""

from __future__ import annotations

from typing import Any

import torch


def compute_logits_in_fp32(model: Any) -> None:
    """Have the output layer of a ...ForCausalLM widen its input and its weight before it multiplies them.

    The weight stays as it is, and may be the embedding's; it has its gradient in its own dtype.

    Raises:
        TypeError: the output layer is no plain linear one.
    """
    head = model.lm_head
    if type(head) is not torch.nn.Linear or head.bias is not None:
        raise TypeError(f"the output layer is {head}, not a linear layer without bias")

    def forward(hidden: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.linear(hidden.float(), head.weight.float())

    head.forward = forward
