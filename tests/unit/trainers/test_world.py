"""World of torch.distributed: its store, and the strategies in it."""

from __future__ import annotations

import socket

import pytest
import torch.distributed as dist

from roll_r3.strategies.base import ProcessInfo
from roll_r3.trainers import world


@pytest.mark.parametrize("address", ["127.0.0.1", "::1"])
def test_a_hosted_port_is_never_free_for_others(address: str) -> None:
    try:
        store = world.host_store(address)
    except OSError:
        assert address == "::1"
        pytest.skip("no IPv6 here")
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with pytest.raises(OSError, match="in use"):
        socket.create_server((address, store.port), family=family)
    client = dist.TCPStore(address, store.port)
    client.set("key", "value")
    assert store.get("key") == b"value"


def test_strategies_share_a_world_and_the_last_one_shuts_it_down() -> None:
    for _ in range(2):  # worlds follow each other in one process
        store = world.host_store("127.0.0.1")
        process = ProcessInfo(master_port=store.port)
        world.join(process)
        world.join(process)
        group = world.side_group()
        assert world.side_group() is group
        world.leave()
        assert dist.is_initialized()
        world.leave()
        assert not dist.is_initialized()


def test_rank_0_hosts_the_store_if_nobody_does() -> None:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    for _ in range(2):
        world.join(ProcessInfo(master_port=port))
        world.leave()
