"""Signs of life, without a cluster: choice of observed processes, and observations of real ones."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from typing import Any
from unittest.mock import MagicMock

import pytest
import ray

from roll_r3.cluster import life_signs as signs
from roll_r3.cluster.life_signs import Identity, Watched


def test_what_a_look_sees_of_a_process_and_no_other_is_killed() -> None:
    process = subprocess.Popen(["sleep", "60"])
    here = Identity("node", process.pid, signs._began(process.pid))
    assert here.began > 0
    assert signs.look(here) == "running"
    os.kill(process.pid, signal.SIGSTOP)
    deadline = time.monotonic() + 10
    while signs.look(here) != "stopped":
        assert time.monotonic() < deadline
    assert signs.look(Identity("node", process.pid, here.began + 1), end=True) == "gone", "another one had its number"
    assert process.poll() is None
    signs.look(here, end=True)
    assert process.wait(10) == -signal.SIGKILL
    assert signs.look(here) == "gone"


@pytest.fixture
def answers(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Reference -> its result, if it has one; every look sees a stopped process."""
    results: dict[str, Any] = {}
    monkeypatch.setattr(ray, "wait", lambda refs, timeout: (refs, []) if refs[0] in results else ([], refs))
    monkeypatch.setattr(ray, "get", lambda ref: results[ref])
    monkeypatch.setattr(signs, "_begin_look", lambda process, end=False: "stopped")
    return results


def worker(known: dict[str, Identity]) -> tuple[Watched, MagicMock]:
    handle = MagicMock()
    handle.alive.remote.side_effect = (f"question {i}" for i in range(100))
    return Watched("rank-0", handle, 4.0, known), handle


def test_a_worker_that_never_answered_may_not_even_have_started(answers: dict[str, Any]) -> None:
    watched, _ = worker({})
    for _ in range(100):
        assert not watched.tick(1.0)
    assert watched.silent == 0.0
    assert watched.state == ""


def test_a_worker_that_answered_in_an_earlier_wait_is_silent_from_the_first_question(answers: dict[str, Any]) -> None:
    me = Identity("node", 123, 1)
    known = {"rank-0": me}
    watched, handle = worker(known)
    for _ in range(3):
        watched.tick(1.0)
    assert (watched.silent, watched.state) == (2.0, "")
    for _ in range(8):
        watched.tick(1.0)
    assert (watched.silent, watched.state) == (10.0, "stopped")
    assert handle.alive.remote.call_count == 1, "no second question before an answer"
    answers["question 0"] = me
    assert watched.tick(1.0)
    assert (watched.silent, watched.state) == (0.0, "")
    for _ in range(10):
        watched.tick(1.0)
    assert handle.alive.remote.call_count == 2, "every 4 seconds"


def test_an_answer_tells_who_it_is_for_the_waits_to_come(answers: dict[str, Any]) -> None:
    known: dict[str, Identity] = {}
    watched, _ = worker(known)
    answers["question 0"] = Identity("node", 123, 1)
    watched.tick(1.0)
    assert watched.tick(1.0)
    assert known == {"rank-0": Identity("node", 123, 1)}
    assert watched.identity == known["rank-0"]
