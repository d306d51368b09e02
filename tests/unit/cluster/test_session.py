"""Start and end of Ray, without a cluster: the test answers in place of Ray."""

from __future__ import annotations

import os
import signal
import stat
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import psutil
import pytest
import ray
from ray._private import utils
from ray._private import worker as ray_worker

from roll_r3.cluster import daemons, folder
from roll_r3.cluster import ray_session as session
from roll_r3.config.pipeline import RLVRConfig
from roll_r3.errors import LostWorkerError, WorkerError

CONFIG = RLVRConfig(exp_name="x", pretrain="p", max_steps=1, actor_train={}, actor_infer={})


class ToldError(BaseException):
    """Exception of the run's own handler."""


@pytest.fixture
def handler(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    def told(*_: object) -> None:
        raise ToldError

    monkeypatch.setattr(ray, "shutdown", lambda: None)
    monkeypatch.setattr(session, "_close_to_others", lambda: None)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    before = signal.signal(signal.SIGTERM, told)
    yield told
    signal.signal(signal.SIGTERM, before)


def take_sigterm() -> None:
    """Take SIGTERM, like `ray.init`."""
    utils.set_sigterm_handler(lambda signum, frame: None)


def test_sigterm_is_the_runs_own_after_ray_did_not_start(handler: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def init(**_: object) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        raise RuntimeError("no daemon")

    monkeypatch.setattr(ray, "init", init)
    with pytest.raises(LostWorkerError, match="no daemon"), session.ray_cluster(CONFIG):
        pass
    assert signal.getsignal(signal.SIGTERM) is handler
    before = utils.set_sigterm_handler
    assert before.__name__ == "set_sigterm_handler", "Ray's own is back"


def test_sigterm_while_ray_starts_is_the_runs_own(handler: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def init(**_: object) -> None:
        take_sigterm()
        os.kill(os.getpid(), signal.SIGTERM)
        pytest.fail("the handler raises")

    monkeypatch.setattr(ray, "init", init)
    with pytest.raises(ToldError), session.ray_cluster(CONFIG):
        pass


def test_no_call_starts_another_ray(handler: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Call Ray after its end, as a late thread or a library does; Ray would start by itself."""
    started: list[object] = []
    monkeypatch.setattr(ray, "init", lambda **options: started.append(options))
    monkeypatch.setattr(session, "_check_is_closed", lambda address: None)
    monkeypatch.setattr(ray.util, "get_node_ip_address", lambda: "127.0.0.1")
    with session.ray_cluster(CONFIG):
        pass
    with pytest.raises(Exception, match="Ray has not been started yet"):
        ray.put(1)
    assert len(started) == 1


@pytest.fixture
def started(handler: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[dict[str, Any]]:
    """Options of Ray's start; its directory is made as by Ray."""
    started: list[dict[str, Any]] = []

    def init(**options: Any) -> None:
        started.append(options)
        Path(options["_temp_dir"]).mkdir()
        Path(options["_temp_dir"]).chmod(0o777)

    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    monkeypatch.setattr(ray, "init", init)
    monkeypatch.setattr(session, "_check_is_closed", lambda address: None)
    monkeypatch.setattr(ray.util, "get_node_ip_address", lambda: "127.0.0.1")
    return started


def test_the_directory_of_ray_is_closed_to_others_and_removed_at_the_end(
    started: list[dict[str, Any]], tmp_path: Path
) -> None:
    with session.ray_cluster(CONFIG):
        (made,) = tmp_path.iterdir()
        assert Path(started[0]["_temp_dir"]).parent == made
        assert stat.S_IMODE(made.stat().st_mode) == 0o700
        assert len(f"{started[0]['_temp_dir']}") - len(str(tmp_path)) < 20, "sockets have short paths"
    assert list(tmp_path.iterdir()) == []


def test_a_long_temporary_directory_is_not_used_for_sockets(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    long = tmp_path / ("x" * 60)
    monkeypatch.delenv("RAY_TMPDIR", raising=False)
    monkeypatch.setenv("TMPDIR", str(long))
    assert folder._base() == "/tmp"
    monkeypatch.setenv("TMPDIR", "/var/tmp")
    assert folder._base() == "/var/tmp"
    monkeypatch.setenv("RAY_TMPDIR", str(long))
    assert folder._base() == str(long), "what was asked for"


def test_a_directory_whose_maker_was_killed_is_removed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    dead, alive, kept, strange = (folder.RayFolder().path for _ in range(4))
    (dead / "maker").write_text(f"{folder.here()} 4194305\n")  # above the largest process id
    (strange / "maker").write_text("elsewhere 4194305\n")
    (kept / "maker").unlink()
    folder.remove_orphaned()
    assert set(tmp_path.iterdir()) == {alive, kept, strange}


def failing(times: int, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Let Ray fail this number of times before it starts."""
    tries: list[int] = []

    def init(**options: Any) -> None:
        tries.append(1)
        if len(tries) <= times:
            raise RuntimeError("the node timed out during startup")

    monkeypatch.setattr(ray, "init", init)
    return tries


def test_where_the_logs_are_of_a_ray_that_did_not_start(
    started: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    failing(1, monkeypatch)
    with (
        pytest.raises(LostWorkerError, match=r"timed out.*\nits own logs are in .*/r3-ray-"),
        session.ray_cluster(CONFIG),
    ):
        pass
    (kept,) = tmp_path.iterdir()
    folder.remove_orphaned()
    assert kept.is_dir(), "somebody wants to know why"


@pytest.mark.parametrize(("late", "times", "tried"), [(0.0, 1, 2), (0.0, 2, 2), (60.0, 1, 1)])
def test_a_ray_that_starts_late_is_tried_once_more(
    started: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch, late: float, times: int, tried: int
) -> None:
    said: list[str] = []
    tries = failing(times, monkeypatch)
    monkeypatch.setattr(session, "LATE", late)
    if tried > times:
        with session.ray_cluster(CONFIG, said.append):
            pass
    else:
        with pytest.raises(LostWorkerError, match="timed out during startup"), session.ray_cluster(CONFIG, said.append):
            pass
    assert len(tries) == tried
    assert ["tried once more" in line for line in said] == [True] * (tried - 1)


def stopped_daemon(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Process that ignores every signal but SIGKILL, in the place of a raylet."""
    process = psutil.Popen(["sleep", "60"])
    os.kill(process.pid, signal.SIGSTOP)
    node = MagicMock(all_processes={"raylet": [MagicMock(process=process)]})
    monkeypatch.setattr(ray_worker, "_global_node", node)
    return process


def test_a_shutdown_that_waits_for_a_stopped_daemon_has_a_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    daemon = stopped_daemon(monkeypatch)
    monkeypatch.setattr(ray, "shutdown", daemon.wait)
    monkeypatch.setattr(daemons, "SHUTDOWN_TIMEOUT", 0.3)
    while daemons.vital()[0].state != "stopped":
        time.sleep(0.01)
    began = time.monotonic()
    daemons.shut_down()
    assert 0.3 <= time.monotonic() - began < 10
    assert daemons.vital()[0].state == "gone"


def test_a_shutdown_that_never_ends_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    ends = threading.Event()
    monkeypatch.setattr(ray, "shutdown", ends.wait)
    monkeypatch.setattr(ray_worker, "shutdown", lambda: None)
    monkeypatch.setattr(daemons, "SHUTDOWN_TIMEOUT", 0.1)
    with pytest.raises(WorkerError, match=r"Ray did not end within 0 s.*start the run again"):
        daemons.shut_down()
    ends.set()


def test_a_signal_in_a_shutdown_kills_what_is_left(monkeypatch: pytest.MonkeyPatch, handler: Any) -> None:
    daemon = stopped_daemon(monkeypatch)
    monkeypatch.setattr(ray, "shutdown", daemon.wait)
    threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGTERM)).start()
    with pytest.raises(ToldError):
        daemons.shut_down()
    deadline = time.monotonic() + 10
    while daemons.vital()[0].state != "gone":
        assert time.monotonic() < deadline
        time.sleep(0.01)
