"""Grouping of tensors into update requests, by size."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch

Weight = tuple[str, torch.Tensor]
"""(Hugging Face name, whole tensor)."""


def fill_buckets(units: Iterable[list[Weight]], size: int) -> Iterator[list[Weight]]:
    """Group weights in order; a bucket is closed once it holds `size` bytes.

    Args:
        units: lists of weights; the weights of a list share a bucket.
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
