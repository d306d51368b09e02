"""Limits of waiting for workers."""

from __future__ import annotations

from roll_r3.config.pipeline import RLVRConfig
from roll_r3.config.rules.table import AnyRule, Rule


def _stopped_is_never_reached(config: RLVRConfig) -> bool:
    limits = config.worker_timeouts
    return limits.silent is not None and (limits.stopped is None or limits.stopped > limits.silent)


RULES: tuple[AnyRule, ...] = (
    Rule(
        id="stopped-worker-limit",
        fields=("worker_timeouts.stopped", "worker_timeouts.silent"),
        why="a stopped process sends no heartbeat, so worker_timeouts.silent ends the wait first",
        fix="write a value for stopped of at most that of silent, or silent: null",
        wrong=("worker_timeouts.stopped=700",),
        right=("worker_timeouts.stopped=600",),
        violates=_stopped_is_never_reached,
    ),
)
