"""Calling many workers at once: the first failure ends the wait, and the message shows who failed and their log."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayActorError, RayError, RayTaskError

from roll_r3.cluster.logs import log_end
from roll_r3.errors import LostWorkerError, RollError, WorkerError

logger = logging.getLogger(__name__)

SETTLE_SECONDS = 5.0
"""After a failure, how long to wait for the others' own failures: when a rank dies, its peers see a closed connection
first, and the dead rank is the one to name."""
SAY_EVERY = 300.0
"""Seconds after which the log says who is still waited for, again and again: a call has no limit, since only its worker
knows how long it may take."""


def wait_for(calls: Mapping[ray.ObjectRef, tuple[str, Path]]) -> dict[ray.ObjectRef, Any]:
    """Wait for all calls, or for the first that fails.

    Args:
        calls: reference -> (worker's name, its log file).

    Returns:
        reference -> result.

    Raises:
        LostWorkerError: a worker died, or lost what it needs of one that did, or raised what is no error of ours, as
            when it loses a peer; a dead one is named before those that only lost it.
        WorkerError: a worker raised another error of ours.
    """
    pending = list(calls)
    results: dict[ray.ObjectRef, Any] = {}
    failures: dict[ray.ObjectRef, RayError] = {}
    deadline = None
    began = said = time.monotonic()
    while pending and (deadline is None or time.monotonic() < deadline):
        until = said + SAY_EVERY if deadline is None else deadline
        ready, pending = ray.wait(pending, num_returns=1, timeout=max(0.0, until - time.monotonic()))
        if pending and time.monotonic() >= said + SAY_EVERY:
            said = time.monotonic()
            names = ", ".join(sorted({calls[ref][0] for ref in pending}))
            logger.warning("still waiting for %s, after %.0f s", names, said - began)
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
    """The failure to show: a death before a loss, a loss before an exception of ours, which it may have brought about,
    and that before one from a library."""

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
