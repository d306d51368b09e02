"""The process group over which weights travel: the trainer is rank 0, the engines' ranks follow."""

from __future__ import annotations

import threading
from datetime import timedelta

import torch.distributed as dist
from torch.distributed import PrefixStore, Store
from torch.distributed.distributed_c10d import Backend, _new_process_group_helper, _world


def join_group(
    store: Store, name: str, *, rank: int, world_size: int, backend: str, timeout_s: float
) -> dist.ProcessGroup:
    """Enter the group beside whatever groups this process has; blocks until all ranks are there.

    Prefix and helper are those of SGLang's own `init_custom_process_group`: all ranks must name their keys alike.
    """
    group, _ = _new_process_group_helper(
        world_size,
        rank,
        [],
        Backend(backend),
        PrefixStore(name, store),
        group_name=name,  # type: ignore[arg-type]
        timeout=timedelta(seconds=timeout_s),
    )
    assert isinstance(group, dist.ProcessGroup), "this process is a member"
    _world.pg_group_ranks[group] = {member: member for member in range(world_size)}  # the helper leaves it to new_group
    return group


def leave_group(group: dist.ProcessGroup) -> None:
    """Cut the connections; what a group still waits for must not hold this process."""
    group.abort()
    threading.Thread(target=dist.destroy_process_group, args=(group,), name="weight-group", daemon=True).start()


def from_the_trainer() -> dist.BroadcastOptions:
    """Options of a broadcast in that group."""
    options = dist.BroadcastOptions()
    options.rootRank = 0
    return options
