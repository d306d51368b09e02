"""End of a run's roles, without a cluster."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from unittest.mock import MagicMock

import numpy as np
import pytest
import ray

from roll_r3.batch.batch import Batch
from roll_r3.batch.trajectory import Trajectory
from roll_r3.cluster.models import ModelGroup
from roll_r3.cluster.roles import FAILED_STOP_TIMEOUT, STOP_TIMEOUT, Roles
from roll_r3.cluster.worker_group import Member
from roll_r3.strategies.base import TrainResult


@pytest.mark.parametrize(("error", "at_once", "limit"), [(None, False, STOP_TIMEOUT), (KeyError, True, 5.0)])
def test_after_a_failure_engines_are_ended_at_once(
    monkeypatch: pytest.MonkeyPatch, error: type[Exception] | None, at_once: bool, limit: float
) -> None:
    """Shut the engines down first: otherwise they are killed before their workers have cleaned up."""
    limits: list[float] = []

    def wait(calls: list[object], *, num_returns: int, timeout: float) -> tuple[list[object], list[object]]:
        limits.append(timeout)
        return calls, []

    monkeypatch.setattr(ray, "wait", wait)
    roles = Roles.__new__(Roles)
    roles.rollout, roles.trainer, roles.reference = MagicMock(), MagicMock(), None
    for group in (roles.rollout, roles.trainer):
        group.begin_close.return_value = {}
    roles.__exit__(error, None, None)
    roles.rollout.begin_close.assert_called_once_with(at_once=at_once)
    roles.trainer.begin_close.assert_called_once_with()
    assert limits == [limit]
    assert FAILED_STOP_TIMEOUT < STOP_TIMEOUT


def test_who_is_impatient_leaves_no_process(monkeypatch: pytest.MonkeyPatch) -> None:
    def wait(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(ray, "wait", wait)
    roles = Roles.__new__(Roles)
    roles.rollout, roles.trainer, roles.reference = MagicMock(), MagicMock(), None
    with pytest.raises(KeyboardInterrupt):
        roles.__exit__(KeyboardInterrupt, None, None)
    roles.rollout.kill.assert_called_once_with()
    roles.trainer.kill.assert_called_once_with()


def test_a_call_goes_out_to_every_rank_or_to_none() -> None:
    """Send the call to all: ranks of a collective hang if one was not called."""
    happened: list[str] = []

    @contextmanager
    def unbroken() -> Iterator[None]:
        happened.append("begin")
        yield
        happened.append("end")

    members = []
    for rank in range(2):
        handle = MagicMock()
        handle.close.remote.side_effect = lambda rank=rank: happened.append(f"rank {rank}") or f"call {rank}"
        members.append(Member(f"actor_train-{rank}", handle, Path("log")))
    calls = ModelGroup(members, unbroken).begin_close()
    assert happened == ["begin", "rank 0", "rank 1", "end"]
    assert list(calls) == ["call 0", "call 1"]


def test_what_an_update_finds_is_in_the_order_of_the_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Return results from two shards, one of two ranks each; none if the batch has old log-probabilities."""
    monkeypatch.setattr(ray, "put", lambda value: value)
    batch = Batch.from_trajectories(
        [
            Trajectory.one_turn(
                f"s{i}",
                "group",
                prompt_ids=[i] * length,
                response_ids=[i],
                log_probs=[1.0],
                version=0,
                finish_reason="stop",
            )
            for i, length in enumerate((5, 3, 4, 2))
        ]
    )

    def step(returns: bool, shard: Batch, number: int) -> TrainResult:
        found = shard.input_ids_N.astype(np.float32) if returns and shard.old_log_probs_N is None else None
        return TrainResult({}, None, log_probs_N=found, entropy_N=None if found is None else found + 10)

    places = [(0, 2, False), (0, 2, True), (1, 2, True), (1, 2, False)]
    group = ModelGroup([])
    group._places = places
    monkeypatch.setattr(
        group,
        "_call_each",
        lambda _, arguments: [step(place[2], *some) for place, some in zip(places, arguments, strict=True)],
    )

    old = group.train_step(batch, 1).old

    assert old is not None and old.entropy_N is not None
    assert np.array_equal(old.log_probs_N, batch.input_ids_N)
    assert np.array_equal(old.entropy_N, batch.input_ids_N + 10)
    brought = replace(batch, old_log_probs_N=np.zeros(len(batch.labels_N), np.float32))
    assert group.train_step(brought, 1).old is None


def test_every_worker_is_met_once_all_have_started() -> None:
    """Meet all workers, so that a worker stopped before its first question is found."""
    happened: list[str] = []
    roles = Roles.__new__(Roles)
    roles.rollout, roles.trainer, roles.reference, roles._waiting = MagicMock(), MagicMock(), None, MagicMock()
    roles.rollout.begin_start.return_value = {}
    roles.trainer.begin_start.return_value = {}
    roles._waiting.wait_for.side_effect = lambda *_: happened.append("started")
    roles._waiting.meet.side_effect = lambda: happened.append("met")
    roles.start()
    assert happened == ["started", "met"]
