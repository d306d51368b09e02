"""What one rank alone may fail at, such as reading or writing a file, fails on all ranks or on none."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch.distributed as dist

from roll_r3.errors import RollError


@contextmanager
def together(kind: type[RollError], failing: str, group: dist.ProcessGroup | None = None) -> Iterator[None]:
    """Whatever a rank raises in this block, every rank raises at its end; collective, and so a barrier.

    Else the others would wait, in the next collective call, for a rank that never comes. The block itself holds no
    collective call.

    Args:
        failing: begins the text of the error.
        group: of all ranks; None: the one that training uses.

    Raises:
        kind: some rank's block raised; with each text that there is, and the first rank that says so.

    Example:
        with together(RollError, f"{path} was not made"):
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
