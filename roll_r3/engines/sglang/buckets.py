"""What SGLang must be given in one update request.

SGLang 0.5.23 fuses the two down-projections of latent attention when both come in one request. A half that comes
without the other is dropped, and nothing says so.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch

from roll_r3.weights.buckets import Weight, fill_buckets

_FUSED = (".q_a_proj.", ".kv_a_proj_with_mqa.")


def fill_fused_buckets(weights: Iterable[Weight], size: int) -> Iterator[list[Weight]]:
    """Group weights as they come; a bucket is closed once it holds `size` bytes.

    A fused half waits for the other one. What has none, as where the query is not of low rank, comes last.
    """
    return fill_buckets(_units(weights), size)


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
