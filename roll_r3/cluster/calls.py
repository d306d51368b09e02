"""Calling many workers at once: the first failure ends the wait, and the message shows who failed and their log."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayActorError, RayError, RayTaskError

from roll_r3.cluster.logs import log_end
from roll_r3.errors import LostWorkerError, RollError, WorkerError

SETTLE_SECONDS = 5.0
"""After a failure, how long to wait for the others' own failures: when a rank dies, its peers see a closed connection
first, and the dead rank is the one to name."""


def wait_for(calls: Mapping[ray.ObjectRef, tuple[str, Path]]) -> dict[ray.ObjectRef, Any]:
    """Wait for all calls, or for the first that fails.

    Args:
        calls: reference -> (worker's name, its log file).

    Returns:
        reference -> result.

    Raises:
        LostWorkerError: a worker died, or raised what is no error of ours, as when it loses a peer; a dead one is named
            before those that only lost it.
        WorkerError: a worker raised an error of ours.
    """
    pending = list(calls)
    results: dict[ray.ObjectRef, Any] = {}
    failures: dict[ray.ObjectRef, RayError] = {}
    deadline = None
    while pending and (deadline is None or time.monotonic() < deadline):
        timeout = None if deadline is None else max(0.0, deadline - time.monotonic())
        ready, pending = ray.wait(pending, num_returns=1, timeout=timeout)
        for ref in ready:
            try:
                results[ref] = ray.get(ref)
            except RayError as error:
                failures[ref] = error
                deadline = deadline or time.monotonic() + SETTLE_SECONDS
                if isinstance(error, RayActorError):
                    pending = []  # the dead one is known: nothing more to learn
    if failures:
        raise _failure({calls[ref]: error for ref, error in failures.items()})
    return results


def _failure(failures: Mapping[tuple[str, Path], RayError]) -> WorkerError:
    """The failure to show: a death before an exception, an exception of ours before one from a library."""

    def rank(item: tuple[tuple[str, Path], RayError]) -> int:
        error = item[1]
        return 0 if isinstance(error, RayActorError) else 1 if isinstance(_cause(error), RollError) else 2

    (name, log), error = min(failures.items(), key=rank)
    others = sorted(n for (n, _) in failures if n != name)
    also = f" (and, because of it or beside it, {', '.join(others)})" if others else ""
    if isinstance(error, RayActorError):
        # a worker that cannot even be made has no log yet: Ray's own words say why
        return LostWorkerError(f"{name} died{also}: its process is gone\n{log_end(log) if log.exists() else error}")
    cause = _cause(error)
    if isinstance(cause, RollError):
        return WorkerError(f"{name} failed{also}: {cause}")
    return LostWorkerError(f"{name} failed{also}: {type(cause).__name__}: {cause}\n{log_end(log)}")


def _cause(error: RayError) -> BaseException:
    return error.cause if isinstance(error, RayTaskError) and error.cause is not None else error
