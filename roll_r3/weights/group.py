"""Process group for weights: the trainer is rank 0, the engines' ranks follow."""

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
"""Tables of torch with an entry per group."""


def join_group(
    store: Store, name: str, *, rank: int, world_size: int, backend: str, timeout_s: float
) -> dist.ProcessGroup:
    """Join the group, independently of the process's other groups; block until all ranks are there.

    Prefix and helper are those of SGLang's own `init_custom_process_group`: all ranks must use the same keys.
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
    """Set the timeout of each broadcast; before, it is the timeout of joining."""
    _set_pg_timeout(timedelta(seconds=timeout_s), group)


def leave_group(group: dist.ProcessGroup) -> None:
    """Close the connections and forget the group, without waiting for its pending operations."""
    group.abort()
    _forget(group)
    threading.Thread(target=group.shutdown, name="weight-group", daemon=True).start()


def _forget(group: dist.ProcessGroup) -> None:
    """Remove a group from torch's tables, as `destroy_process_group` does after the shutdown.

    The leaving thread does this itself: it may end every group next, and that empties the same tables.
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
    """Return the options of a broadcast in this group."""
    options = dist.BroadcastOptions()
    options.rootRank = 0
    return options
