"""Which of several failures is shown, and as what; and who is named while nothing comes. Without a cluster."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import ray
from ray.exceptions import ActorDiedError, RayError, RayTaskError

from roll_r3.cluster import calls
from roll_r3.errors import EngineError, LostWorkerError, RouteError, WorkerError


def raised(cause: Exception) -> RayTaskError:
    """As the driver sees what a worker raised."""
    return RayTaskError("train_step", "...", cause)


LOST, DAMAGED = LostWorkerError("routes are lost"), RouteError("a check sum is wrong")
FAILURES = {
    "lost": ([LOST], LostWorkerError, "rank-0 failed: routes are lost"),
    "lost, and another's own error": ([DAMAGED, LOST], LostWorkerError, r"rank-1 failed \(and.*rank-0\): routes are"),
    "a death, and what it brought about": ([LOST, ActorDiedError()], LostWorkerError, "rank-1 died"),
    "ours": ([DAMAGED], WorkerError, "rank-0 failed: a check sum is wrong"),
    "ours, and a library's": ([RuntimeError("closed"), EngineError("no")], WorkerError, r"rank-1 failed \(.*\): no"),
    "a library's": ([RuntimeError("closed")], LostWorkerError, "rank-0 failed: RuntimeError: closed"),
}


@pytest.mark.parametrize(("errors", "kind", "said"), FAILURES.values(), ids=FAILURES)
def test_a_loss_stays_one_whoever_tells_of_it(
    tmp_path: Path, errors: Sequence[Exception], kind: type[WorkerError], said: str
) -> None:
    failures = {
        (f"rank-{i}", tmp_path / f"{i}.log"): e if isinstance(e, RayError) else raised(e) for i, e in enumerate(errors)
    }
    with pytest.raises(kind, match=said) as caught:
        raise calls._failure(failures)
    assert type(caught.value) is kind


def test_who_is_waited_for_long_is_named_in_the_log(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    looks: list[float] = []

    def wait(pending: list[Any], *, num_returns: int, timeout: float) -> tuple[list[Any], list[Any]]:
        looks.append(timeout)
        time.sleep(timeout if len(looks) < 4 else 0)
        return (pending[:1], pending[1:]) if len(looks) >= 3 else ([], pending)

    monkeypatch.setattr(calls, "SAY_EVERY", 0.05)
    monkeypatch.setattr(ray, "wait", wait)
    monkeypatch.setattr(ray, "get", lambda ref: f"of {ref}")
    log = Path("/dev/null")
    with caplog.at_level(logging.WARNING):
        results = calls.wait_for({"a": ("rank-0", log), "b": ("rank-1", log)})  # type: ignore[dict-item]
    assert results == {"a": "of a", "b": "of b"}
    said = [record.getMessage().partition(", after")[0] for record in caplog.records]
    assert said == ["still waiting for rank-0, rank-1"] * 2 + ["still waiting for rank-1"]
