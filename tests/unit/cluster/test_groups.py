"""How the roles of a run are ended, without a cluster."""

from __future__ import annotations

from unittest.mock import MagicMock

import pytest
import ray

from roll_r3.cluster.groups import FAILED_STOP_TIMEOUT, STOP_TIMEOUT, Roles


@pytest.mark.parametrize(("error", "at_once", "limit"), [(None, False, STOP_TIMEOUT), (KeyError, True, 5.0)])
def test_after_a_failure_engines_are_ended_at_once(
    monkeypatch: pytest.MonkeyPatch, error: type[Exception] | None, at_once: bool, limit: float
) -> None:
    """Else they are killed before their workers have removed what they leave."""
    limits: list[float] = []

    def wait(calls: list[object], *, num_returns: int, timeout: float) -> tuple[list[object], list[object]]:
        limits.append(timeout)
        return calls, []

    monkeypatch.setattr(ray, "wait", wait)
    roles = Roles.__new__(Roles)
    roles.rollout, roles.trainer, roles.reference = MagicMock(), MagicMock(), None
    for group in (roles.rollout, roles.trainer):
        group.begin_close.return_value = {}
    roles.__exit__(error, None, None)
    roles.rollout.begin_close.assert_called_once_with(at_once=at_once)
    roles.trainer.begin_close.assert_called_once_with()
    assert limits == [limit]
    assert FAILED_STOP_TIMEOUT < STOP_TIMEOUT
