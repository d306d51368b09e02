"""Mapping from tensors of transformers' modules to tensors of a checkpoint.

transformers keeps a layer's experts in two tensors, `gate_up_proj` [E, 2 I, H] and `down_proj` [E, H, I], and calls
every MoE block `mlp`. A checkpoint has one matrix per expert under the names of `roll_r3.models.architectures`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from types import EllipsisType

from roll_r3.models.architectures.base import Architecture

Part = tuple[str, tuple[int | slice | EllipsisType, ...]]
"""Name in the checkpoint, and index into the module's tensor."""

_RENAMED = {
    "mlp.gate.weight": "mlp.router.weight",
    "mlp.gate.e_score_correction_bias": "mlp.router.expert_bias",
}
"""Names of transformers with other names in some checkpoints -> keys of `Architecture.layer_names`."""


def parts_of(name: str, shape: Sequence[int], architecture: Architecture) -> Iterator[Part]:
    """Yield the checkpoint's tensors for a parameter or buffer of a ...ForCausalLM.

    Example:
        for part, index in parts_of(name, tensor.shape, architecture):
            tensor[index].copy_(checkpoint[part])
    """
    found = re.fullmatch(r"(model\.layers\.\d+\.)(.*)", name)
    prefix, inner = found.groups() if found else ("", name)
    names = architecture.layer_names
    if inner == "mlp.experts.gate_up_proj":
        gate, up = names["mlp.experts.linear_fc1.weight"]
        half = shape[1] // 2
        for expert in range(shape[0]):
            yield prefix + gate.format(expert), (expert, slice(None, half))
            yield prefix + up.format(expert), (expert, slice(half, None))
    elif inner == "mlp.experts.down_proj":
        (down,) = names["mlp.experts.linear_fc2.weight"]
        for expert in range(shape[0]):
            yield prefix + down.format(expert), (expert,)
    elif inner in _RENAMED:
        (same,) = names[_RENAMED[inner]]
        yield prefix + same, (...,)
    else:
        yield name, (...,)
