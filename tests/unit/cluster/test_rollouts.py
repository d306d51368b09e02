"""The engines' workers as the pool calls them, without a cluster."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import pytest
import ray

from roll_r3.cluster import calls
from roll_r3.cluster.rollouts import RolloutGroup
from roll_r3.cluster.worker_group import Member
from roll_r3.config.sampling_settings import Sampling
from roll_r3.strategies.base import GenerateRequest


def request(name: str) -> GenerateRequest:
    return GenerateRequest((1,), (name,), (0,), name, Sampling(max_new_tokens=1), record_routes=False)


@pytest.fixture
def ended(monkeypatch: pytest.MonkeyPatch) -> dict[Any, Any]:
    """Call -> its result, of those that have ended."""
    found: dict[Any, Any] = {}

    def wait(pending: list[Any], *, num_returns: int, timeout: float) -> tuple[list[Any], list[Any]]:
        ready = [ref for ref in pending if ref in found][:num_returns]
        return ready, [ref for ref in pending if ref not in ready]

    monkeypatch.setattr(ray, "wait", wait)
    monkeypatch.setattr(ray, "get", found.__getitem__)
    monkeypatch.setattr(calls, "vital", lambda: [])
    return found


def group_of(count: int) -> tuple[RolloutGroup, list[MagicMock]]:
    handles = [MagicMock() for _ in range(count)]
    for i, handle in enumerate(handles):
        handle.begin_generate.remote.return_value = f"begun {i}"
        handle.generated.remote.side_effect = lambda number, begun, i=i: f"engine {i}, call {number}"
        handle.restart.remote.return_value = f"restart {i}"
    members = [Member(f"actor_infer-{i}", handle, Path("log")) for i, handle in enumerate(handles)]
    return RolloutGroup(members), handles


def test_requests_go_out_in_one_call_and_results_come_one_by_one(ended: dict[Any, Any]) -> None:
    group, handles = group_of(2)
    first = group.begin_generate("actor_infer-1", [request("a"), request("b")])
    second = group.begin_generate("actor_infer-0", [request("c")])
    assert [*first, *second] == ["engine 1, call 0", "engine 1, call 1", "engine 0, call 2"]
    handles[1].begin_generate.remote.assert_called_once_with({0: request("a"), 1: request("b")})
    handles[1].generated.remote.assert_called_with(1, "begun 1")  # or a failed begin would be waited for in vain
    restart = group.begin_restart("actor_infer-0")
    ended |= {first[1]: "b", restart: ""}
    assert group.ended(None) == {first[1]: "b", restart: ""}
    assert group.ended(0.0) == {}
    ended |= {first[0]: "a", second[0]: "c"}
    assert group.ended(1.0) == {first[0]: "a", second[0]: "c"}


def test_an_abort_follows_the_call_that_began_the_request(ended: dict[Any, Any]) -> None:
    group, handles = group_of(2)
    first, second = group.begin_generate("actor_infer-1", [request("a"), request("b")])
    group.abort([second])
    handles[1].abort.remote.assert_called_once_with(1, "begun 1")  # Ray keeps no order among calls
    handles[0].abort.remote.assert_not_called()
    ended |= {first: "a", second: "nothing"}
    assert group.ended(None) == {first: "a", second: "nothing"}
    assert group._begun == {}


def test_a_wait_is_named_after_its_calls(ended: dict[Any, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """A restart takes longer than samples do, so each has a limit of its own."""
    group, _ = group_of(2)
    kinds: list[str] = []
    watch = group._waiting.watch
    monkeypatch.setattr(group._waiting, "watch", lambda kind: kinds.append(kind) or watch(kind))
    restart = group.begin_restart("actor_infer-0")
    (call,) = group.begin_generate("actor_infer-1", [request("a")])
    group.ended(0.0)
    ended[call] = "a"
    group.ended(0.0)
    group.ended(0.0)
    ended[restart] = ""
    group.ended(0.0)
    assert kinds == ["generate", "restart"]
