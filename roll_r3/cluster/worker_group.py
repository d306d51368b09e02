"""Workers of one role: actors that are called together."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray

from roll_r3.cluster.calls import Waiting

Unbroken = Callable[[], AbstractContextManager[None]]
Calls = dict[ray.ObjectRef[Any], tuple[str, Path]]
"""Calls under way: reference -> (worker's name, its log file)."""


@dataclass(frozen=True)
class Member:
    name: str
    handle: Any
    log: Path


class WorkerGroup:
    """Actors of one role."""

    def __init__(
        self, members: Sequence[Member], unbroken: Unbroken = nullcontext, waiting: Waiting | None = None
    ) -> None:
        """Args:
        unbroken: holds signals back while a call goes out to one member after the other. Ranks that were called
            would wait for ever, in a collective, for the others.
        waiting: waits for the members, and asks them for signs of life.
        """
        self._members = tuple(members)
        self._unbroken = unbroken
        self._waiting = waiting or Waiting()
        for member in self._members:
            self._waiting.add(member.name, member.handle, member.log)

    def _call_each(self, method: str, arguments: Sequence[tuple[Any, ...]]) -> list[Any]:
        """Call one method on every member, each with its own arguments; results in member order."""
        calls = self._begin_each(method, arguments)
        results = self._waiting.wait_for(calls, method)
        return [results[ref] for ref in calls]

    def _begin_each(self, method: str, arguments: Sequence[tuple[Any, ...]]) -> Calls:
        """The same, without waiting."""
        with self._unbroken():
            return {
                getattr(m.handle, method).remote(*a): (m.name, m.log)
                for m, a in zip(self._members, arguments, strict=True)
            }

    def _call(self, method: str, *arguments: Any) -> list[Any]:
        """Call one method on every member with the same arguments."""
        return self._call_each(method, [arguments] * len(self._members))

    def kill(self) -> None:
        """End every member's process."""
        for member in self._members:
            ray.kill(member.handle, no_restart=True)
