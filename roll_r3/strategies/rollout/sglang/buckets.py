"""Which tensors an update request holds: a size to fill, and what SGLang must be given at once.

SGLang 0.5.23 fuses the two down-projections of latent attention when both come in one request. A half that comes
without the other is dropped, and nothing says so.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch

Weight = tuple[str, torch.Tensor]
"""(Hugging Face name, whole tensor)."""

_FUSED = (".q_a_proj.", ".kv_a_proj_with_mqa.")


def fill_buckets(weights: Iterable[Weight], size: int) -> Iterator[list[Weight]]:
    """Group weights as they come; a bucket is closed once it holds `size` bytes.

    A fused half waits for the other one. What has none, as where the query is not of low rank, comes last.
    """
    bucket: list[Weight] = []
    held = 0
    for unit in _units(weights):
        bucket += unit
        held += sum(tensor.nbytes for _, tensor in unit)
        if held >= size:
            yield bucket
            bucket, held = [], 0
    if bucket:
        yield bucket


def _units(weights: Iterable[Weight]) -> Iterator[list[Weight]]:
    """Weights one by one, but for the two that must come together."""
    waiting: dict[str, torch.Tensor] = {}
    for name, tensor in weights:
        other = _other_half(name)
        if other is None:
            yield [(name, tensor)]
        elif other in waiting:
            yield [(other, waiting.pop(other)), (name, tensor)]
        else:
            waiting[name] = tensor
    for weight in waiting.items():
        yield [weight]


def _other_half(name: str) -> str | None:
    for half, other in (_FUSED, _FUSED[::-1]):
        if half in name:
            return name.replace(half, other)
    return None
