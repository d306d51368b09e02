"""Grouping of tensors for SGLang, fused ones in one update request.

SGLang 0.5.23 fuses the two down-projections of latent attention if both come in one request. It drops a single half
silently.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch

from roll_r3.weights.buckets import Weight, fill_buckets

_FUSED = (".q_a_proj.", ".kv_a_proj_with_mqa.")


def fill_fused_buckets(weights: Iterable[Weight], size: int) -> Iterator[list[Weight]]:
    """Group weights in order; a bucket is closed once it holds `size` bytes.

    A fused half waits for the other one. A half without another (the query is not of low rank) comes last.
    """
    return fill_buckets(_units(weights), size)


def _units(weights: Iterable[Weight]) -> Iterator[list[Weight]]:
    """Yield weights one by one, except the two halves to fuse."""
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
    """Return the name of the tensor to fuse with, or None."""
    for half, other in (_FUSED, _FUSED[::-1]):
        if half in name:
            return name.replace(half, other)
    return None
