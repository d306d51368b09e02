"""Processes of a Ray started by this run, and Ray's end within a limit.

Ray waits for its daemons without a limit: a stopped daemon would keep the run for ever. A cluster that the run only
joined is left alone.
"""

from __future__ import annotations

import atexit
import contextlib
import logging
import os
import signal
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import ray
from ray._private import worker as ray_worker

from roll_r3.errors import WorkerError

logger = logging.getLogger(__name__)

SHUTDOWN_TIMEOUT = 30.0
"""Seconds for Ray to end, and again after its daemons were killed."""
VITAL = ("gcs_server", "raylet")
"""Daemons that Ray cannot do without."""


@dataclass(frozen=True)
class Daemon:
    """One of Ray's own processes."""

    name: str
    pid: int
    state: str
    """"gone", "stopped" or "running"."""


def _started() -> list[tuple[str, Any]]:
    """Names and `Popen` objects."""
    node = getattr(ray_worker, "_global_node", None)
    if node is None:
        return []
    return [(name, info.process) for name, infos in node.all_processes.items() for info in infos]


def vital() -> list[Daemon]:
    """Return the vital daemons started by this run, in their present state."""
    return [
        Daemon(name, process.pid, "gone" if process.poll() is not None else process_state(process.pid))
        for name, process in _started()
        if name in VITAL
    ]


def process_state(pid: int) -> str:
    """ "gone", "stopped" (by SIGSTOP) or "running" of a process on this machine."""
    try:
        status = psutil.Process(pid).status()
    except psutil.Error:
        return "gone"
    return {psutil.STATUS_STOPPED: "stopped", psutil.STATUS_ZOMBIE: "gone"}.get(status, "running")


def kill_all() -> None:
    """Kill Ray's daemons started by this run, and the workers below them: a stopped process takes no other signal."""
    for _, process in _started():
        if process.poll() is None:
            with contextlib.suppress(psutil.Error):
                for child in psutil.Process(process.pid).children(recursive=True):
                    kill(child.pid)
            kill(process.pid)


def kill_started_in(folder: Path) -> None:
    """Kill descendants with the given directory in their command, and all below them: a Ray that did not start.

    Ray's agents have a title in place of their command, and outlive the raylet above them by about a minute.
    """
    found: set[int] = set()
    for child in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):
            if any(str(folder) in argument for argument in child.cmdline()):
                found |= {process.pid for process in (child, *child.children(recursive=True))}
    for pid in found:
        kill(pid)


def kill(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.kill(pid, signal.SIGKILL)


def shut_down() -> None:
    """Leave Ray, and end its processes started by this run, within a limit.

    Raises:
        WorkerError: Ray does not end even without its daemons; this process cannot use Ray any more.
    """
    if any(daemon.state == "gone" for daemon in vital()):
        kill_all()  # Ray would end this process, without a word, ten seconds after it lost its server
    done = threading.Event()

    def run() -> None:
        try:
            ray.shutdown()
        except Exception:  # of any kind: what is left of Ray is killed
            logger.exception("Ray's shutdown")
        done.set()

    threading.Thread(target=run, name="ray-shutdown", daemon=True).start()
    try:
        if done.wait(SHUTDOWN_TIMEOUT):
            return
        logger.warning("Ray did not end within %.0f s: its processes are killed", SHUTDOWN_TIMEOUT)
        kill_all()
        if done.wait(SHUTDOWN_TIMEOUT):
            return
    except BaseException:  # a signal: nothing is waited for
        kill_all()
        raise
    atexit.unregister(ray_worker.shutdown)  # it would wait for ever too
    raise WorkerError(
        f"Ray did not end within {2 * SHUTDOWN_TIMEOUT:.0f} s, so this process cannot go on by itself: start the run "
        "again with resume_from_checkpoint: auto"
    )
