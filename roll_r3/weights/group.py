"""The process group over which weights travel: the trainer is rank 0, the engines' ranks follow."""

from __future__ import annotations

import threading
from datetime import timedelta

import torch.distributed as dist
from torch.distributed import PrefixStore, Store
from torch.distributed.distributed_c10d import (
    Backend,
    _new_process_group_helper,
    _set_pg_timeout,
    _unregister_process_group,
    _world,
)

_TABLES = ("pg_map", "pg_names", "pg_group_ranks", "pg_backend_config", "pg_coalesce_state")
"""What torch keeps of each group, by the group."""


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


def set_timeout(group: dist.ProcessGroup, timeout_s: float) -> None:
    """Limit of one broadcast from now on; until then it is that of joining."""
    _set_pg_timeout(timedelta(seconds=timeout_s), group)


def leave_group(group: dist.ProcessGroup) -> None:
    """Cut the connections and forget the group; what it still waits for must not hold this process."""
    group.abort()
    _forget(group)
    threading.Thread(target=group.shutdown, name="weight-group", daemon=True).start()


def _forget(group: dist.ProcessGroup) -> None:
    """Take a group out of torch's tables, as `destroy_process_group` does once the group is shut down.

    Done by the thread that leaves: it may end every group next, which empties the same tables.
    """
    for name in _TABLES:
        getattr(_world, name, {}).pop(group, None)
    tag = getattr(_world, "pg_to_tag", {}).pop(group, None)
    by_tag = getattr(_world, "tags_to_pg", {})
    for members in (by_tag.get(tag, []), by_tag.get("", [])):
        if group in members:
            members.remove(group)
    _unregister_process_group(group.group_name)


def from_the_trainer() -> dist.BroadcastOptions:
    """Options of a broadcast in that group."""
    options = dist.BroadcastOptions()
    options.rootRank = 0
    return options
