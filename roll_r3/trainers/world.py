"""The torch.distributed world of this process, which the strategies that live in it share."""

from __future__ import annotations

from datetime import timedelta

import torch
import torch.distributed as dist

from roll_r3.strategies.base import ProcessInfo

COLLECTIVE_TIMEOUT = timedelta(minutes=30)
"""After which a rank that waits for another gives up."""

_members = 0
"""Strategies of this process that use the world."""
_beside: dist.ProcessGroup | None = None


def join(process: ProcessInfo) -> torch.device:
    """Make the world, or share the one that a strategy of this process made; collective.

    Returns:
        The device that models of this process live on.
    """
    global _members
    device = torch.device("cuda", process.local_rank) if process.device == "cuda" else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if not dist.is_initialized():
        dist.init_process_group(
            "nccl" if device.type == "cuda" else "gloo",
            init_method=f"tcp://{process.master_addr}:{process.master_port}",
            rank=process.rank,
            world_size=process.world_size,
            timeout=COLLECTIVE_TIMEOUT,
        )
    _members += 1
    return device


def beside() -> dist.ProcessGroup:
    """A second group of all ranks, over their hosts (gloo), for what a thread does while another one trains: calls of
    two threads over one group would be taken for each other's. The first call makes it, and is collective."""
    global _beside
    if _beside is None:
        _beside = dist.new_group(backend="gloo", timeout=COLLECTIVE_TIMEOUT)
    return _beside


def leave() -> None:
    """Undo one `join`; the last one takes the world down."""
    global _members, _beside
    _members -= 1
    if _members == 0:
        dist.destroy_process_group()
        _beside = None
