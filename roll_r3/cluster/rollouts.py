"""`actor_infer`: its engines, one worker each."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from itertools import count
from pathlib import Path
from typing import Any

import ray

from roll_r3.cluster.actors import RolloutWorker
from roll_r3.cluster.calls import Waiting, Watch
from roll_r3.cluster.life_signs import SIGNS
from roll_r3.cluster.placement import Placement
from roll_r3.cluster.variables import runtime_env
from roll_r3.cluster.worker_group import Calls, Member, WorkerGroup
from roll_r3.config.derived import engine_devices
from roll_r3.config.pipeline import RLVRConfig
from roll_r3.config.rules.devices import (
    ENGINE_ON_ONE_NODE,
    ENGINES_BEYOND_LOOPBACK,
    engines_out_of_reach,
    scattered_engines,
)
from roll_r3.strategies.base import GenerateRequest

CALLS_AT_ONCE = 10_000
"""Calls that a worker answers at once: one per request under way, and a few others."""


class RolloutGroup(WorkerGroup):
    """`actor_infer`: its engines."""

    def __init__(self, members: Sequence[Member], waiting: Waiting | None = None) -> None:
        super().__init__(members, waiting=waiting)
        self._numbers = count()
        self._under_way: dict[Any, tuple[str, Path]] = {}
        self._restarting: set[Any] = set()
        self._begun: dict[Any, tuple[int, Any]] = {}
        """Call of `generated` -> its number, and the call of `begin_generate` before it."""
        self._watch: Watch | None = None

    @classmethod
    def launch(
        cls, config: RLVRConfig, placement: Placement, log_dir: Path, waiting: Waiting | None = None
    ) -> RolloutGroup:
        """One actor per engine, on the node of the engine's devices. Nothing is started yet.

        Raises:
            ConfigError: an engine's devices lie on different nodes, or a node is out of reach of the trainer.
        """
        ENGINE_ON_ONE_NODE.require(config, scattered_engines(config, placement.node_of))
        ENGINES_BEYOND_LOOPBACK.require(config, engines_out_of_reach(config, placement.node_of))
        members = []
        for engine, numbers in enumerate(engine_devices(config)):
            devices = [placement.devices[d] for d in numbers]
            name, log = f"actor_infer-{engine}", log_dir / f"actor_infer-{engine}.log"
            gpu_ids = tuple(d.gpu_id for d in devices if d.gpu_id is not None)
            actor = ray.remote(concurrency_groups={SIGNS: 1})(RolloutWorker).options(  # type: ignore[call-overload]
                name=name,
                max_concurrency=CALLS_AT_ONCE,
                runtime_env=runtime_env(config.system_envs),
                **placement.options(devices[0].index),
            )
            members.append(Member(name, actor.remote(config, engine, placement.kind, gpu_ids, log), log))
        return cls(members, waiting=waiting)

    def begin_start(self) -> Calls:
        return self._begin_each("start", [()] * len(self._members))

    def begin_generate(self, name: str, requests: Sequence[GenerateRequest]) -> list[Hashable]:
        """Give requests to an engine all at once, for it to batch them; return one call per request."""
        member = self._named(name)
        numbers = [next(self._numbers) for _ in requests]
        begun = member.handle.begin_generate.remote(dict(zip(numbers, requests, strict=True)))
        refs: list[Hashable] = [member.handle.generated.remote(number, begun) for number in numbers]
        self._under_way |= dict.fromkeys(refs, (member.name, member.log))
        self._begun |= {ref: (number, begun) for ref, number in zip(refs, numbers, strict=True)}
        return refs

    def abort(self, calls: Sequence[Hashable]) -> None:
        """Have engines end requests of `begin_generate`. Each call still ends, with a result that may be empty."""
        for call in calls:
            number, begun = self._begun[call]
            self._named(self._under_way[call][0]).handle.abort.remote(number, begun)

    def begin_restart(self, name: str) -> Hashable:
        """Restart an engine. The result of the call is empty, or the reason for a failed start."""
        member = self._named(name)
        ref: Hashable = member.handle.restart.remote()
        self._under_way[ref] = (member.name, member.log)
        self._restarting.add(ref)
        return ref

    def ended(self, timeout: float | None) -> dict[Hashable, Any]:
        """Wait for the first of the calls begun here, at most `timeout` seconds; return the results of all ended ones.

        Raises:
            WorkerError: a worker failed or died.
        """
        kind = "restart" if self._under_way.keys() <= self._restarting else "generate"
        if self._watch is None or self._watch.kind != kind:
            self._watch = self._waiting.watch(kind)
        results: dict[Any, Any] = self._waiting.take(self._under_way, self._watch, timeout)
        for ref in results:
            del self._under_way[ref]
            self._begun.pop(ref, None)
            self._restarting.discard(ref)
        if results:
            self._watch.came()
        if not self._under_way:
            self._watch = None
        return results

    def down(self, *, ask: bool) -> dict[str, str]:
        """Return worker's name -> why its engine needs a restart, for engines that are down.

        Args:
            ask: have each engine give a sign of life.
        """
        reasons = self._call("why_down", ask)
        return {member.name: why for member, why in zip(self._members, reasons, strict=True) if why}

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the workers, one per engine."""
        return tuple(member.name for member in self._members)

    def _named(self, name: str) -> Member:
        return self._members[self.names.index(name)]

    def begin_close(self, *, at_once: bool) -> Calls:
        """End every engine: in order, or at once, since workers do not get the time for order after a failure."""
        return self._begin_each("close", [(at_once,)] * len(self._members))

    def weight_targets(self) -> list[Any]:
        return self._call("weight_target")

    def weights_updated(self, version: int) -> None:
        self._call("weights_updated", version)
