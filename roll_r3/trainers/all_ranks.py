"""Failures of one rank alone, such as reading or writing a file, raised on all ranks."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch.distributed as dist

from roll_r3.errors import RollError


@contextmanager
def raise_on_all_ranks(kind: type[RollError], failing: str, group: dist.ProcessGroup | None = None) -> Iterator[None]:
    """Raise an error of one rank's block on every rank, at the block's end; collective, and so a barrier.

    Otherwise the other ranks would wait in the next collective call forever. The block itself holds no collective
    call.

    Args:
        failing: beginning of the error's text.
        group: all ranks; None: training's group.

    Raises:
        kind: some rank's block raised. The text has each distinct reason, with the first rank to give it.

    Example:
        with raise_on_all_ranks(RollError, f"{path} was not made"):
            if dist.get_rank() == 0:
                path.mkdir()
    """
    failure: Exception | None = None
    try:
        yield
    except Exception as error:  # noqa: BLE001  it is raised below
        failure = error
    texts: list[str | None] = [None] * dist.get_world_size(group)
    dist.all_gather_object(texts, failure and _text(failure), group=group)
    first = {text: rank for rank, text in reversed(list(enumerate(texts))) if text}
    if first:
        reasons = "; ".join(f"rank {rank}: {text}" for text, rank in sorted(first.items(), key=lambda item: item[1]))
        raise kind(f"{failing}: {reasons}") from failure


def _text(error: Exception) -> str:
    return str(error) if isinstance(error, RollError) else f"{type(error).__name__}: {error}"
