"""Where each tensor of a checkpoint lies in the model: transformers 5 stacks a layer's experts."""

from __future__ import annotations

import torch

from roll_r3.models.architectures import ARCHITECTURES
from roll_r3.models.facts import ModelFacts


def tensors_by_name(model: torch.nn.Module, facts: ModelFacts) -> dict[str, torch.Tensor]:
    """Name in the checkpoint's files -> the model's memory for it. A tied output layer has no name of its own."""
    state = model.state_dict(keep_vars=True)
    found: dict[str, torch.Tensor] = {}
    names = ARCHITECTURES[facts.model_type].layer_names
    (router,), (gate, up), (down,) = (
        names[f"mlp.{part}.weight"] for part in ("router", "experts.linear_fc1", "experts.linear_fc2")
    )
    for layer in facts.moe_layers:
        prefix = f"model.layers.{layer}"
        found[f"{prefix}.{router}"] = state.pop(f"{prefix}.mlp.gate.weight").data
        gate_up, downs = (state.pop(f"{prefix}.mlp.experts.{part}").data for part in ("gate_up_proj", "down_proj"))
        for expert in range(facts.num_experts):
            first, second = gate_up[expert].chunk(2)
            found[f"{prefix}.{gate.format(expert)}"] = first
            found[f"{prefix}.{up.format(expert)}"] = second
            found[f"{prefix}.{down.format(expert)}"] = downs[expert]
    tied = state["lm_head.weight"] is state["model.embed_tokens.weight"]
    return found | {name: tensor.data for name, tensor in state.items() if not (tied and name == "lm_head.weight")}
