"""Report of a worker about an engine that does not restart, without a cluster."""

from __future__ import annotations

import asyncio

import pytest

from roll_r3.cluster.workers import RolloutWorker
from roll_r3.errors import ConfigError, EngineError


class Strategy:
    """Strategy that starts again after one failure."""

    def __init__(self, failure: Exception) -> None:
        self._failures = [failure]

    async def restart(self) -> None:
        if self._failures:
            raise self._failures.pop()


@pytest.mark.parametrize(
    ("failure", "why"),
    [
        (EngineError("engine 0 did not start"), "engine 0 did not start"),
        (ConfigError("/models/tiny/config.json cannot be read: [Errno 5]"), "/models/tiny/config.json cannot be read"),
        (OSError(28, "No space left on device"), "No space left on device"),
        (TimeoutError(), "TimeoutError()"),
    ],
    ids=["engine", "configuration", "disk", "without words"],
)
def test_an_engine_that_does_not_start_again_is_one_failure_and_may_be_tried_again(
    failure: Exception, why: str
) -> None:
    worker = RolloutWorker.__new__(RolloutWorker)
    worker._strategy = Strategy(failure)

    async def scenario() -> None:
        assert why in await worker.restart()
        assert await worker.restart() == ""

    asyncio.run(scenario())


def test_a_mistake_of_the_program_is_not_taken_for_an_engine_that_does_not_start() -> None:
    worker = RolloutWorker.__new__(RolloutWorker)
    worker._strategy = Strategy(KeyError("x"))
    with pytest.raises(KeyError):
        asyncio.run(worker.restart())
