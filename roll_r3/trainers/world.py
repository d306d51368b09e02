"""World of torch.distributed in this process, shared by all strategies of the process."""

from __future__ import annotations

import os
import socket
from datetime import timedelta

import torch
import torch.distributed as dist

from roll_r3.strategies.base import ProcessInfo

COLLECTIVE_TIMEOUT = timedelta(minutes=30)
"""Time after which a rank gives up waiting for another."""
_REFUSED_S = 10.0
"""Time to find out whether a store is hosted."""

_members = 0
"""Number of strategies of this process in the world."""
_side_group: dist.ProcessGroup | None = None


def host_store(address: str) -> dist.TCPStore:
    """Start the store of one world on a free port of `address`, and return it. Its `port` is for `ProcessInfo`.

    The store listens from the moment the port is chosen, so nobody else can take the port while ranks still import.
    The caller keeps the store until the world has ended. Every rank is then a client, as under torchrun, whose agent
    hosts the store.
    """
    return _hosted(address, 0)


def _hosted(address: str, port: int) -> dist.TCPStore:
    """Host a store. `port` 0: a free one."""
    listener = socket.create_server((address, port), family=socket.AF_INET6 if ":" in address else socket.AF_INET)
    port = listener.getsockname()[1]
    return dist.TCPStore(
        address,
        port,
        is_master=True,
        timeout=COLLECTIVE_TIMEOUT,
        wait_for_workers=False,
        master_listen_fd=listener.detach(),
    )


def _store(process: ProcessInfo) -> dist.TCPStore:
    """Return this rank's store. Rank 0 hosts it if nobody does, for ranks started by hand or by another launcher."""
    if process.rank == 0:
        try:
            socket.create_connection((process.master_addr, process.master_port), timeout=_REFUSED_S).close()
        except ConnectionRefusedError:
            return _hosted(process.master_addr, process.master_port)
        except OSError:
            pass  # the client below reports it
    return dist.TCPStore(process.master_addr, process.master_port, timeout=COLLECTIVE_TIMEOUT)


def join(process: ProcessInfo) -> torch.device:
    """Join the world of `process`, or share this process's own one; collective.

    Returns:
        Device of this process's models.
    """
    global _members
    device = torch.device("cuda", process.local_rank) if process.device == "cuda" else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if not dist.is_initialized():
        store = _store(process)
        dist.init_process_group(
            "nccl" if device.type == "cuda" else "gloo",
            # torchrun restarts ranks on the store that it hosts: keys of an earlier attempt must not be read
            store=dist.PrefixStore(f"attempt_{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store),
            rank=process.rank,
            world_size=process.world_size,
            timeout=COLLECTIVE_TIMEOUT,
        )
    _members += 1
    return device


def side_group() -> dist.ProcessGroup:
    """Return a second group of all ranks, over their hosts (gloo), for a thread at work during training.

    Calls of two threads over one group would be mixed up. The first call makes the group, and is collective.
    """
    global _side_group
    if _side_group is None:
        _side_group = dist.new_group(backend="gloo", timeout=COLLECTIVE_TIMEOUT)
    return _side_group


def leave() -> None:
    """Undo one `join`; the last one shuts the world down."""
    global _members, _side_group
    _members -= 1
    if _members == 0:
        dist.destroy_process_group()
        _side_group = None
