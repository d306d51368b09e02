"""Exceptions shared by modules: one root, few leaves.

The user can fix a `ConfigError`; the others stop a run. Internal invariants use `assert`.
"""


class RollError(Exception):
    """Root of all errors raised on purpose; the text is for the user."""


class ConfigError(RollError):
    """Invalid configuration; the text has each field, its value, the reason, and a fix."""


class RouteError(RollError, ValueError):
    """Invalid recorded routes: wrong rows, layers or ids, or a layer never filled in."""


class ReplayError(RollError):
    """Misused replay session, or a row not consumed exactly once: no later result can be trusted."""


class EngineError(RollError):
    """Failed, dead, or refusing rollout engine."""


class CheckpointError(RollError):
    """Damaged checkpoint, or one that could not be written."""


class WorkerError(RollError):
    """Failed or dead worker process of the cluster; the text has the end of its log."""


class BusyError(RollError):
    """Resource held by another process; the same command works after its end."""


class LostWorkerError(WorkerError):
    """Lost worker, or a worker cut off from others. Not known to be a mistake: a run may restart its workers and resume
    from its newest checkpoint."""
