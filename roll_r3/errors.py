"""The exceptions that cross module borders: one root, few leaves.

A `ConfigError` is the user's to mend, the others stop a run. Internal invariants use `assert`.
"""


class RollError(Exception):
    """Root of every error that roll_r3 raises on purpose; its text is meant for the person who runs it."""


class ConfigError(RollError):
    """The configuration cannot work; the text names each field, its value, why, and what to write instead."""


class RouteError(RollError, ValueError):
    """Recorded routes break their contract: wrong rows, layers, ids, or a layer that was never filled in."""


class ReplayError(RollError):
    """A replay session was misused or a row was not consumed exactly once: nothing after it can be trusted."""


class EngineError(RollError):
    """A rollout engine refused, failed, or died."""


class CheckpointError(RollError):
    """A checkpoint is damaged, or could not be written."""


class WorkerError(RollError):
    """A worker process of the cluster failed or died; the text carries the end of its log."""


class BusyError(RollError):
    """Another process holds what the run needs; the same command works once that one has ended."""


class LostWorkerError(WorkerError):
    """A worker is gone, or lost what it needs of others: nobody's mistake, as far as can be told, and a run may go on
    from its newest checkpoint with workers of a new start."""
