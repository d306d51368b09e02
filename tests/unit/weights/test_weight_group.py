"""Entering and leaving the group of a weight update, next to torch's groups for others."""

from __future__ import annotations

import threading

import pytest
import torch.distributed as dist
from torch.distributed import HashStore
from torch.distributed.distributed_c10d import _world

from roll_r3.weights.group import join_group, leave_group

ROUNDS = 60


@pytest.fixture
def thread_errors(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """Exceptions of threads; pytest itself would only warn of them."""
    errors: list[object] = []
    monkeypatch.setattr(threading, "excepthook", errors.append)
    return errors


def join(name: str) -> dist.ProcessGroup:
    return join_group(HashStore(), name, rank=0, world_size=1, backend="gloo", timeout_s=10.0)


def ended() -> None:
    """Wait for the threads of group shutdowns."""
    for thread in threading.enumerate():
        if thread.name == "weight-group":
            thread.join(10.0)


def test_all_groups_may_be_ended_right_after_one_was_left(thread_errors: list[object]) -> None:
    for _ in range(ROUNDS):
        dist.init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
        leave_group(join("weights"))
        dist.destroy_process_group()
    ended()
    assert thread_errors == []


def test_a_group_that_was_left_is_in_no_table_and_its_name_is_free() -> None:
    tables = ("pg_map", "pg_names", "pg_group_ranks", "pg_backend_config", "pg_coalesce_state", "pg_to_tag")
    for _ in range(2):
        group = join("weights")
        assert group in _world.pg_map
        leave_group(group)
        assert not any(group in getattr(_world, table) for table in tables)
        assert not any(group in members for members in _world.tags_to_pg.values())
    ended()
