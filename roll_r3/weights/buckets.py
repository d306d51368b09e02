"""Which tensors an update request holds: a size to fill."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch

Weight = tuple[str, torch.Tensor]
"""(Hugging Face name, whole tensor)."""


def fill_buckets(units: Iterable[list[Weight]], size: int) -> Iterator[list[Weight]]:
    """Group weights as they come; a bucket is closed once it holds `size` bytes.

    Args:
        units: weights, in lists of those that must share a bucket.
    """
    bucket: list[Weight] = []
    held = 0
    for unit in units:
        bucket += unit
        held += sum(tensor.nbytes for _, tensor in unit)
        if held >= size:
            yield bucket
            bucket, held = [], 0
    if bucket:
        yield bucket
