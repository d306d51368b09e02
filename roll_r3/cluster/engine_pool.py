"""All engines behind one queue: requests go in, results come out in the order in which they end.

Balancing, lost engines, retries of lost samples, restarts and weight versions are settled here and nowhere else.
"""

from __future__ import annotations

import logging
import math
import time
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import Enum, auto
from itertools import count
from typing import Any, Protocol

from roll_r3.config.derived import samples_at_once, server
from roll_r3.config.pipeline import RLVRConfig
from roll_r3.errors import EngineError
from roll_r3.strategies.base import GenerateRequest, GenerateResult

logger = logging.getLogger(__name__)

LIMIT = "actor_infer.strategy_args.strategy_config.max_restarts"
AHEAD = 4
"""Samples given to a server, in multiples of the number that it runs at once. A group counts in full until its longest
sample ends: with 2, and lengths that vary widely, a third of a server is idle in a simulation; with 4, nothing is."""
LEAST_GROUPS = 2
"""Groups given to an engine, however large. The failure of one alone is too little to call the engine broken."""


class Rollouts(Protocol):
    """The engines' workers, as `RolloutGroup` has them."""

    @property
    def names(self) -> tuple[str, ...]: ...

    def begin_generate(self, name: str, requests: Sequence[GenerateRequest]) -> list[Hashable]: ...

    def abort(self, calls: Sequence[Hashable]) -> None: ...

    def begin_restart(self, name: str) -> Hashable: ...

    def ended(self, timeout: float | None) -> dict[Hashable, Any]: ...

    def down(self, *, ask: bool) -> dict[str, str]: ...

    def weight_targets(self) -> list[Any]: ...

    def weights_updated(self, version: int) -> None: ...


class Sender(Protocol):
    """The trainer's side of a weight update, as `ModelGroup` has it."""

    def connect_engines(self, targets: Sequence[Any]) -> None: ...

    def update_weights(self, version: int) -> str: ...


@dataclass(frozen=True)
class Ticket:
    """A submitted request."""

    number: int
    """Ascending in the order of submission."""
    request: GenerateRequest


@dataclass(frozen=True)
class Completed:
    """A submitted request with its result, in which nothing is lost."""

    ticket: Ticket
    result: GenerateResult


class _State(Enum):
    UP = auto()
    LOST = auto()
    """Down, and asked for nothing more; calls may still be under way."""
    STARTING = auto()
    FRESH = auto()
    """Restarted, with the checkpoint's weights."""


@dataclass
class _Engine:
    name: str
    state: _State = _State.UP
    samples: int = 0
    """Samples under way, those of a group until all of them have ended."""
    groups: int = 0
    """Requests under way."""
    lost: int = 0
    """Samples lost since it was last up."""


@dataclass
class _Task:
    ticket: Ticket
    rest: GenerateRequest
    """The missing samples."""
    result: GenerateResult = field(default_factory=lambda: GenerateResult(()))
    """The samples so far."""
    aborted: bool = False
    """True if nobody waits for its result any more."""


class EnginePool:
    """The engines of `actor_infer`, with the weights of `actor_train`.

    A request is a prompt's group. It stays on one engine, where its prefix is shared, unless that engine is lost.
    Requests wait in one queue, and each server is given a few more than it runs at once. So a quicker one gets more.
    The transformers engine gets its share at once, in turn: its batches, and so its samples, must not depend on time.

    An engine that is lost is restarted while the others go on, and its lost samples are asked of any engine again,
    under the same ids and seeds. Before the restarted engine samples it gets the trainer's weights, and all engines
    with it: no request is under way then. Until the next `update_weights` the trainer must keep the weights of the last
    one while results are waited for.

    Example:
        >>> pool.update_weights(0)                      # doctest: +SKIP
        >>> tickets = pool.submit(requests)             # doctest: +SKIP
        >>> while pool.in_flight:                       # doctest: +SKIP
        ...     for done in pool.completed():
        ...         results[done.ticket] = done.result
    """

    def __init__(self, config: RLVRConfig, rollout: Rollouts, trainer: Sender, say: Callable[[str], None]) -> None:
        """
        Args:
            say: shows a line to the person who started the run.
        """
        settings = server(config)
        self._max_restarts = settings.max_restarts if settings is not None else 0
        self._window = AHEAD * samples_at_once(settings) if settings is not None else math.inf
        self._rollout, self._trainer, self._say = rollout, trainer, say
        self._engines = {name: _Engine(name) for name in rollout.names}
        self._queue: deque[_Task] = deque()
        self._under_way: dict[Hashable, tuple[_Engine, _Task]] = {}
        self._starting: dict[Hashable, _Engine] = {}
        self._done: list[Completed] = []
        self._numbers = count()
        self._connected = False
        self._version = 0
        self._failures: Counter[str] = Counter()
        self._restarts = 0

    @property
    def in_flight(self) -> int:
        """Number of requests submitted, not aborted, and not yet returned by `completed`."""
        under_way = sum(not task.aborted for _, task in self._under_way.values())
        return len(self._queue) + under_way + len(self._done)

    def submit(self, requests: Sequence[GenerateRequest]) -> list[Ticket]:
        """Queue requests and begin as many as the engines have room for; return their tickets in the same order."""
        tickets = [Ticket(next(self._numbers), request) for request in requests]
        self._queue.extend(_Task(ticket, ticket.request) for ticket in tickets)
        self._dispatch()
        return tickets

    def abort(self, tickets: Sequence[Ticket]) -> None:
        """Give up requests: `completed` returns none of them. Their engines end samples under way, and get others."""
        given_up = {ticket.number for ticket in tickets}
        if not given_up:
            return
        self._queue = deque(task for task in self._queue if task.ticket.number not in given_up)
        self._done = [done for done in self._done if done.ticket.number not in given_up]
        calls = [call for call, (_, task) in self._under_way.items() if task.ticket.number in given_up]
        for call in calls:
            self._under_way[call][1].aborted = True
        self._rollout.abort(calls)

    def completed(self, timeout: float | None = None) -> list[Completed]:
        """Wait for results and return them in the order in which they came.

        Args:
            timeout: seconds to wait at most; None: until there is a result.

        Returns:
            One result or more; none if the time is up or nothing is in flight.

        Raises:
            EngineError: an engine went down more often than the configuration allows in a step.
            WorkerError: a worker failed or died.
        """
        deadline = None if timeout is None else time.monotonic() + timeout
        while not self._done and self.in_flight:
            self._repair()
            self._dispatch()
            left = None if deadline is None else max(0.0, deadline - time.monotonic())
            self._take(left)
            if left == 0.0:
                break
        done, self._done = self._done, []
        return done

    def update_weights(self, version: int) -> None:
        """Have every engine sample from the trainer's weights, which have this version, from now on.

        Requests under way end first, with the weights that they began with; queued ones wait. A lost engine is
        restarted first. If an engine goes down during the update all are restarted: the others hold parts of both
        versions.

        Raises:
            EngineError: an engine refused the weights, or went down more often than the configuration allows.
            WorkerError: a worker failed or died.
        """
        self._version = version
        while self._under_way:
            self._take(None)
        self._restart_lost()
        self._deliver()
        self._dispatch()

    def step_done(self) -> int:
        """Return the number of restarts since the last step. The count of every engine's failures starts again."""
        restarts, self._restarts = self._restarts, 0
        self._failures.clear()
        return restarts

    def _dispatch(self) -> None:
        """Give queued requests to engines with room, the emptiest first."""
        if any(engine.state is _State.FRESH for engine in self._engines.values()) and not self._starting:
            return  # they get their weights as soon as nothing is under way
        given: dict[str, list[_Task]] = defaultdict(list)
        while self._queue:
            ready = [e for e in self._engines.values() if e.state is _State.UP and self._has_room(e)]
            if not ready:
                break
            engine = min(ready, key=lambda e: e.samples)
            task = self._queue.popleft()
            engine.samples += len(task.rest.sample_ids)
            engine.groups += 1
            given[engine.name].append(task)
        for name, tasks in given.items():
            calls = self._rollout.begin_generate(name, [task.rest for task in tasks])
            self._under_way |= {call: (self._engines[name], task) for call, task in zip(calls, tasks, strict=True)}

    def _has_room(self, engine: _Engine) -> bool:
        return engine.samples < self._window or engine.groups < LEAST_GROUPS

    def _take(self, timeout: float | None) -> None:
        """Wait for a call to end, and settle every call that has ended."""
        if not self._under_way and not self._starting:
            return
        for call, outcome in self._rollout.ended(timeout).items():
            if call in self._starting:
                self._started(self._starting.pop(call), outcome)
            else:
                self._came(*self._under_way.pop(call), outcome)

    def _came(self, engine: _Engine, task: _Task, result: GenerateResult) -> None:
        """Settle the answer to a task: it is done, or its lost samples go to the front of the queue."""
        engine.samples -= len(task.rest.sample_ids)
        engine.groups -= 1
        if task.aborted:
            return
        task.result = joined(task.ticket.request, task.result, result)
        if not result.lost:
            self._done.append(Completed(task.ticket, task.result))
            return
        engine.state = _State.LOST
        engine.lost += len(result.lost)
        task.rest = still_lost(task.rest, result)
        self._queue.appendleft(task)

    def _repair(self) -> None:
        """Restart lost engines, and give restarted ones their weights once nothing is under way."""
        self._restart_lost()
        fresh = any(engine.state is _State.FRESH for engine in self._engines.values())
        if fresh and self._queue and not self._starting and not self._under_way:
            self._deliver()

    def _restart_lost(self) -> None:
        """Begin the restart of lost engines of which no call is under way any more."""
        lost = [e for e in self._engines.values() if e.state is _State.LOST and not e.groups]
        if not lost:
            return
        down = self._rollout.down(ask=False)
        self._restart({engine.name: down.get(engine.name, "samples were lost") for engine in lost})
        self._say(f"samples requested again: {sum(engine.lost for engine in lost)}")
        for engine in lost:
            engine.lost = 0

    def _deliver(self) -> None:
        """Send the trainer's weights to all engines, with every engine up and nothing under way."""
        starting = {engine.name for engine in self._starting.values()}
        self._restart({name: why for name, why in self._rollout.down(ask=False).items() if name not in starting})
        while True:
            while self._starting:
                self._take(None)
            if not self._connected:
                self._trainer.connect_engines(self._rollout.weight_targets())
                self._connected = True
            failure = self._trainer.update_weights(self._version)
            if not failure:
                break
            down = self._rollout.down(ask=True)
            if not down:
                raise EngineError(f"the engines did not get weights {self._version}: {failure}")
            self._restart(down, also=[name for name in self._engines if name not in down])
        self._rollout.weights_updated(self._version)
        for engine in self._engines.values():
            engine.state = _State.UP

    def _restart(self, down: Mapping[str, str], also: Sequence[str] = ()) -> None:
        """Begin to restart engines.

        Args:
            down: worker's name -> why its engine is restarted.
            also: workers whose engines did not fail.

        Raises:
            EngineError: an engine failed too often.
        """
        for name, why in down.items():
            self._failures[name] += 1
            self._blame(name, why)
        for name in (*down, *also):
            self._restarts += 1
            self._connected = False
            self._engines[name].state = _State.STARTING
            self._starting[self._rollout.begin_restart(name)] = self._engines[name]

    def _started(self, engine: _Engine, why_not: str) -> None:
        """Settle a restart: the engine is up, or is restarted again."""
        if why_not:
            self._restart({engine.name: why_not})
        else:
            engine.state = _State.FRESH

    def _blame(self, name: str, why: str) -> None:
        """Report an engine's failure, or end the run if there were too many."""
        failures = self._failures[name]
        if failures > self._max_restarts:
            raise EngineError(
                f"{name} failed: {why}\nIt failed {failures} times before a step was done, and {LIMIT} is "
                f"{self._max_restarts}"
            )
        logger.warning("%s failed and is restarted (%d of %d): %s", name, failures, self._max_restarts, why)
        self._say(
            f"{name} failed and is restarted ({failures} of {self._max_restarts} times before a step is done): "
            f"{why.splitlines()[0].partition('; the end of ')[0]} (more in logs/driver.log)"
        )


def still_lost(request: GenerateRequest, result: GenerateResult) -> GenerateRequest:
    """Return a request for the samples that a result lost, under their ids and seeds."""
    seeds = dict(zip(request.sample_ids, request.seeds, strict=True))
    return replace(request, sample_ids=result.lost, seeds=tuple(seeds[sample_id] for sample_id in result.lost))


def joined(request: GenerateRequest, result: GenerateResult, again: GenerateResult) -> GenerateResult:
    """Add the answer about lost samples to a result, in the order of the request."""
    came = [*result.trajectories, *again.trajectories]
    by_id = {trajectory.sample_id: trajectory for trajectory in came}
    assert len(by_id) == len(came), "a sample that came is not asked for again"
    return GenerateResult(
        trajectories=tuple(by_id[sample_id] for sample_id in request.sample_ids if sample_id in by_id),
        dropped=result.dropped | again.dropped,
        lost=again.lost,
        retries=result.retries + again.retries,
    )
