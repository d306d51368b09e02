"""Signs of life: workers answer beside any computation, and a look at a process shows if it is stopped."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from roll_r3.cluster.daemons import kill, process_state

SIGNS = "signs"
"""Concurrency group of calls answered in a thread of their own, beside any other call."""
PING_EVERY = 10.0
LOOK_EVERY = 10.0
"""Seconds between two looks at the process of a silent worker."""


@dataclass(frozen=True)
class Identity:
    """A process of the cluster."""

    node_id: str
    pid: int
    began: int
    """Start of the process in clock ticks of its kernel. Together with `pid` it is unique."""


def identity() -> Identity:
    """This process, within a worker."""
    pid = os.getpid()
    return Identity(ray.get_runtime_context().get_node_id(), pid, _began(pid))


def _began(pid: int) -> int:
    """Clock ticks since the machine started; -1: there is no such process."""
    try:
        # the name in brackets may hold anything
        return int(Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()[19])
    except OSError:
        return -1


def look(process: Identity, end: bool = False) -> str:
    """On the node of a process: "gone", "stopped" or "running".

    Args:
        end: kill it.
    """
    if _began(process.pid) != process.began:
        return "gone"
    if end:
        kill(process.pid)
    return process_state(process.pid)


class Watched:
    """One worker: how long it has been silent, and why, as far as can be seen.

    Time is counted by the caller of `tick`: a driver that was stopped itself, with its whole machine, heard nobody in
    that time.
    """

    def __init__(self, name: str, handle: Any, every: float, known: dict[str, Identity]) -> None:
        """Args:
        every: seconds between two questions, and between two looks.
        known: processes of workers with an earlier answer, by name; added to.
        """
        self.name = name
        self._known = known
        self.silent = 0.0
        """Seconds without a sign of life, for a worker with at least one."""
        self.state = ""
        """Result of the last look while it is silent; empty: none yet."""
        self.reported = False
        """True once its silence was reported."""
        self._handle, self._every = handle, every
        self._ping: ray.ObjectRef[Identity] | None = None
        self._look: ray.ObjectRef[str] | None = None
        self._until_ping, self._until_look = 0.0, 0.0

    @property
    def identity(self) -> Identity | None:
        """None: it has never answered. It may not even have started."""
        return self._known.get(self.name)

    def tick(self, seconds: float) -> bool:
        """Count the given seconds; return True if it answered just now."""
        self._until_ping -= seconds
        if self._ping is None:
            if self._until_ping <= 0:
                self._ping = self._handle.alive.remote()
                self._until_look = self._every
            return False
        found = _taken(self._ping)
        if found is None:
            if self.identity is not None:
                self.silent += seconds
                self._look_after(seconds)
            return False
        self._ping, self._until_ping = None, self._every
        self._look, self.silent, self.state = None, 0.0, ""
        if isinstance(found, Identity):  # else it is dead, as its call tells better
            self._known[self.name] = found
        return True

    def kill(self) -> None:
        """Kill its process, on any node: a stopped one takes nothing from Ray."""
        if self.identity is not None:
            begun = _begin_look(self.identity, end=True)
            if not isinstance(begun, str):
                ray.wait([begun], timeout=LOOK_EVERY)

    def _look_after(self, seconds: float) -> None:
        assert self.identity is not None, "only who has answered once is silent"
        if self._look is not None:
            found = _taken(self._look)
            if found is not None:
                self._look, self._until_look = None, self._every
                self.state = found if isinstance(found, str) else ""
            return
        self._until_look -= seconds
        if self._until_look <= 0:
            begun = _begin_look(self.identity)
            if isinstance(begun, str):
                self.state, self._until_look = begun, self._every
            else:
                self._look = begun


def _begin_look(process: Identity, end: bool = False) -> Any:
    """Look at a process of this node, or start a task on its own node. Returns the state, or the task's reference."""
    if process.node_id == ray.get_runtime_context().get_node_id():
        return look(process, end)
    there = NodeAffinitySchedulingStrategy(process.node_id, soft=False)
    task: Any = ray.remote(look)  # Ray's types know no default arguments
    return task.options(num_cpus=0, scheduling_strategy=there, max_retries=0).remote(process, end)


def _taken(ref: ray.ObjectRef[Any]) -> Any:
    """The result; an error of Ray's as it is; None: there is none yet."""
    ready, _ = ray.wait([ref], timeout=0)
    if not ready:
        return None
    try:
        return ray.get(ref)
    except RayError as error:
        return error
