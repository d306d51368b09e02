"""Calls to many workers at once. The first failure ends the wait; its message names the worker and shows its log.

A call has no limit of its own, since only its worker knows how long it may take. Workers give signs of life instead.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayActorError, RayError, RayTaskError

from roll_r3.cluster.daemons import kill_all, vital
from roll_r3.cluster.life_signs import PING_EVERY, Identity, Watched
from roll_r3.cluster.logs import log_end
from roll_r3.config.sections import WorkerTimeoutsConfig
from roll_r3.errors import LostWorkerError, RollError, WorkerError

logger = logging.getLogger(__name__)

SETTLE_SECONDS = 5.0
"""Seconds to wait for further failures after the first. When a rank dies, its peers see a closed connection before
the death of the rank is known, and the dead rank is the one to name.
"""
TICK = 1.0
"""Seconds between two looks around while nothing comes."""
SAY_AFTER = 60.0
"""Seconds until the terminal lists the workers still waited for. Twice the longest such call so far, if longer."""
SAY_EVERY = 300.0
"""Seconds until it says so again."""
SILENT_AFTER = 30.0
"""Seconds without a sign of life until the terminal reports it."""
ADDED = 60.0
"""Seconds allowed for a call beyond twice the longest of its kind."""
_NAMED = 8

Calls = Mapping[ray.ObjectRef[Any], tuple[str, Path]]
"""Calls under way: reference -> (worker's name, its log file)."""
Say = Callable[[str], None]


class Waiting:
    """Waits for the calls of an attempt's workers, reports long waits, and treats stopped or silent workers as lost.

    Threads may wait at the same time.
    """

    def __init__(self, limits: WorkerTimeoutsConfig | None = None, say: Say | None = None) -> None:
        """Args:
        say: shows a line to the person who started the run; all lines are logged too.
        """
        self.limits = limits or WorkerTimeoutsConfig()
        self._say = say
        self._workers: dict[str, tuple[Any, Path]] = {}
        """Name -> (actor, its log file)."""
        self._known: dict[str, Identity] = {}
        """Processes of the workers with an answer so far, by name."""
        self._longest: dict[str, float] = {}
        """Kind of a call -> seconds."""

    def add(self, name: str, handle: Any, log: Path) -> None:
        """Have a worker give signs of life while anybody is waited for. It answers `alive` (see `signs.identity`)."""
        self._workers[name] = (handle, log)

    def meet(self) -> None:
        """Wait until every worker has answered once. Without a first answer a silent worker could not be found."""
        calls = {handle.alive.remote(): (name, log) for name, (handle, log) in self._workers.items()}
        found = self.wait_for(calls, "alive")
        self._known |= {calls[ref][0]: process for ref, process in found.items()}

    def wait_for(self, calls: Calls, kind: str = "") -> dict[ray.ObjectRef[Any], Any]:
        """Wait for all calls, or for the first failure.

        Args:
            kind: calls of one kind take about as long as one another.

        Returns:
            reference -> result.

        Raises:
            LostWorkerError: as `take`.
            WorkerError: as `take`.
        """
        pending = dict(calls)
        results: dict[ray.ObjectRef[Any], Any] = {}
        watch = self.watch(kind)
        while pending:
            ended = self.take(pending, watch)
            results |= ended
            pending = {ref: worker for ref, worker in pending.items() if ref not in ended}
        watch.came()
        return results

    def take(self, calls: Calls, watch: Watch, timeout: float | None = None) -> dict[ray.ObjectRef[Any], Any]:
        """Wait until at least one call has ended, or for `timeout` seconds. More calls may go out between two takes.

        Args:
            watch: the calls' own, the same for every take.

        Returns:
            reference -> result, for the calls that have ended.

        Raises:
            LostWorkerError: a worker died, lost something of a dead one, or raised an error that is not ours, as when
                it loses a peer; a dead worker is named first. Or a limit has passed, or Ray itself is gone.
            WorkerError: a worker raised another error of ours.
        """
        watch.look_at_daemons(0.0)  # Ray would end this process without a word
        deadline = None if timeout is None else time.monotonic() + timeout
        while True:
            left = TICK if deadline is None else max(0.0, min(TICK, deadline - time.monotonic()))
            ready, pending = ray.wait(list(calls), num_returns=1, timeout=left)
            if ready and pending:
                more, pending = ray.wait(pending, num_returns=len(pending), timeout=0.0)
                ready = [*ready, *more]
            results = self._results(ready, pending, calls)
            if pending:
                watch.look(sorted({calls[ref][0] for ref in pending}))
            if results or (deadline is not None and time.monotonic() >= deadline):
                return results

    def _results(
        self, ready: list[ray.ObjectRef[Any]], pending: list[ray.ObjectRef[Any]], calls: Calls
    ) -> dict[ray.ObjectRef[Any], Any]:
        """Return the results of ended calls; raise as `take`, after the others had time to fail too."""
        results, failures = _read(ready)
        deadline = time.monotonic() + SETTLE_SECONDS
        while failures and pending and (left := deadline - time.monotonic()) > 0:
            if any(isinstance(error, RayActorError) for error in failures.values()):
                break  # the dead worker is known: nothing more to learn
            ready, pending = ray.wait(pending, num_returns=1, timeout=min(TICK, left))
            failures |= _read(ready)[1]
        if failures:
            raise _failure({calls[ref]: error for ref, error in failures.items()})
        return results

    def watch(self, kind: str = "") -> Watch:
        """Begin to watch calls of a kind."""
        return Watch(self, kind)

    def lasted(self, kind: str, seconds: float) -> None:
        self._longest[kind] = max(self._longest.get(kind, 0.0), seconds)

    def longest(self, kind: str) -> float:
        """Seconds of the longest calls of a kind so far; 0: there was none."""
        return self._longest.get(kind, 0.0)

    def report(self, text: str) -> None:
        logger.warning("%s", text)
        if self._say is not None:
            self._say(text)

    def watched(self) -> list[Watched]:
        """Every worker, as of now."""
        limits = [limit for limit in (self.limits.stopped, self.limits.silent) if limit is not None]
        every = min([PING_EVERY, *(limit / 4 for limit in limits)])
        return [Watched(name, handle, every, self._known) for name, (handle, _) in self._workers.items()]


class Watch:
    """State of one wait: when to report it, and when to end it without a result.

    It counts only the seconds in which this process ran. If the whole machine was stopped, no worker is to blame.
    """

    def __init__(self, waiting: Waiting, kind: str) -> None:
        self._waiting, self.kind, self._limits = waiting, kind, waiting.limits
        self._workers = waiting.watched()
        self._stopped_daemons: dict[str, float] = {}
        self._looked = time.monotonic()
        self.spent = 0.0
        """Seconds since the wait began, or since the last result."""
        self._say_at = max(SAY_AFTER, 2 * waiting.longest(kind))

    def came(self) -> None:
        """Note a result: the wait for the next one begins."""
        self._waiting.lasted(self.kind, self.spent)
        self.spent, self._say_at = 0.0, max(SAY_AFTER, 2 * self._waiting.longest(self.kind))

    def look(self, pending: Sequence[str]) -> None:
        """Check signs of life, at most every `TICK` seconds.

        Args:
            pending: names of the workers still waited for.

        Raises:
            LostWorkerError: as `Waiting.take`.
        """
        passed = time.monotonic() - self._looked
        if passed < TICK:
            return
        self._looked += passed
        seconds = min(passed, 2 * TICK)
        self.spent += seconds
        self.look_at_daemons(seconds)
        for worker in self._workers:
            self._look_at(worker, seconds)
        if self.spent >= self._say_at:
            self._say_at = self.spent + SAY_EVERY
            self._waiting.report(f"still waiting for {_listed(pending)}, after {self.spent:.0f} s{self._of()}")
        limit = self._limits.call
        if limit is not None and self.spent > max(limit, 2 * self._waiting.longest(self.kind) + ADDED):
            for worker in self._workers:
                if worker.name in pending:
                    worker.kill()
            raise LostWorkerError(
                f"{_listed(pending)} did not answer within {self.spent:.0f} s{self._of()}; worker_timeouts.call is "
                f"{limit:g}"
            )

    def _of(self) -> str:
        return f" ({self.kind})" if self.kind else ""

    def _look_at(self, worker: Watched, seconds: float) -> None:
        silent = worker.silent
        if worker.tick(seconds):
            if worker.reported:
                worker.reported = False
                self._waiting.report(f"{worker.name} continues after {silent:.0f} s without a sign of life")
            return
        limits, ended = self._limits, worker.state in ("stopped", "gone")
        limit, field = (limits.stopped, "stopped") if ended else (limits.silent, "silent")
        if limit is not None and worker.silent >= limit:
            said = _process(worker)
            worker.kill()
            raise LostWorkerError(
                f"{worker.name} gave no sign of life for {worker.silent:.0f} s: {said}; worker_timeouts.{field} is "
                f"{limit:g}"
            )
        if not worker.reported and worker.silent >= min(SILENT_AFTER, limit / 2 if limit else SILENT_AFTER):
            worker.reported = True
            end = f"it is taken as lost after {limit:g} s" if limit is not None else "nothing ends the wait"
            self._waiting.report(
                f"{worker.name} gives no sign of life for {worker.silent:.0f} s: {_process(worker)}; {end} "
                f"(worker_timeouts.{field})"
            )

    def look_at_daemons(self, seconds: float) -> None:
        """Look at Ray's own processes alone."""
        for daemon in vital():
            if daemon.state == "gone":
                kill_all()
                raise LostWorkerError(f"Ray's {daemon.name} is gone (process {daemon.pid}): it was killed, or crashed")
            stopped = self._stopped_daemons.get(daemon.name, 0.0) + seconds if daemon.state == "stopped" else 0.0
            self._stopped_daemons[daemon.name] = stopped
            if self._limits.stopped is not None and stopped >= self._limits.stopped:
                kill_all()
                raise LostWorkerError(
                    f"Ray's {daemon.name} has been stopped for {stopped:.0f} s (process {daemon.pid}); "
                    f"worker_timeouts.stopped is {self._limits.stopped:g}"
                )


def _read(
    refs: Sequence[ray.ObjectRef[Any]],
) -> tuple[dict[ray.ObjectRef[Any], Any], dict[ray.ObjectRef[Any], RayError]]:
    """Return the results and the failures of calls that have ended."""
    results: dict[ray.ObjectRef[Any], Any] = {}
    failures: dict[ray.ObjectRef[Any], RayError] = {}
    for ref in refs:
        try:
            results[ref] = ray.get(ref)
        except RayError as error:
            failures[ref] = error
    return results, failures


def _process(worker: Watched) -> str:
    pid = worker.identity.pid if worker.identity is not None else 0
    return {
        "stopped": f"its process {pid} is stopped (SIGSTOP)",
        "gone": f"its process {pid} is gone",
        "running": f"its process {pid} runs, and does not answer",
    }.get(worker.state, f"its process {pid} cannot be seen")


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return ", ".join(names[:_NAMED]) + more


def _failure(failures: Mapping[tuple[str, Path], RayError]) -> WorkerError:
    """Choose the failure to show.

    A death comes before a loss, and a loss before an exception of ours, of which it may be the cause. An exception of a
    library comes last.
    """

    def rank(item: tuple[tuple[str, Path], RayError]) -> int:
        error = item[1]
        kinds = (RayActorError, LostWorkerError, RollError)
        found = error if isinstance(error, RayActorError) else _cause(error)
        return next((i for i, kind in enumerate(kinds) if isinstance(found, kind)), len(kinds))

    (name, log), error = min(failures.items(), key=rank)
    others = sorted(n for (n, _) in failures if n != name)
    also = f" (and, because of it or beside it, {', '.join(others)})" if others else ""
    if isinstance(error, RayActorError):
        # a worker that cannot even be made has no log yet: Ray's own words say why
        return LostWorkerError(f"{name} died{also}: its process is gone\n{log_end(log) if log.exists() else error}")
    cause = _cause(error)
    if isinstance(cause, RollError):
        kind = LostWorkerError if isinstance(cause, LostWorkerError) else WorkerError
        return kind(f"{name} failed{also}: {cause}")
    return LostWorkerError(f"{name} failed{also}: {type(cause).__name__}: {cause}\n{log_end(log)}")


def _cause(error: RayError) -> BaseException:
    return error.cause if isinstance(error, RayTaskError) and error.cause is not None else error
