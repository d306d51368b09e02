"""Report of a worker about an engine that does not restart, without a cluster."""

from __future__ import annotations

import asyncio

import pytest

from roll_r3.cluster.actors import RolloutWorker
from roll_r3.config.sampling_settings import Sampling
from roll_r3.errors import ConfigError, EngineError
from roll_r3.strategies.base import GenerateRequest, GenerateResult


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


class Echo:
    """Answers each request with its id as the dropped sample, the first one last."""

    def __init__(self) -> None:
        self.asked: list[str] = []

    async def generate(self, request: GenerateRequest) -> GenerateResult:
        self.asked.append(request.group_id)
        for _ in range(10 * (request.group_id == "a")):
            await asyncio.sleep(0)
        return GenerateResult((), {request.group_id: "bad"})


def test_requests_begin_together_and_each_result_is_taken_by_itself() -> None:
    worker = RolloutWorker.__new__(RolloutWorker)
    worker._strategy, worker._generating, worker._num_experts = Echo(), {}, 8  # type: ignore[assignment]
    sampling = Sampling(max_new_tokens=1)
    requests = {
        number: GenerateRequest((1,), (name,), (0,), name, sampling, record_routes=False)
        for number, name in enumerate("ab", 5)
    }

    async def scenario() -> None:
        ended: list[str] = []

        async def take(number: int) -> None:
            ended.extend((await worker.generated(number, None)).dropped)

        await worker.begin_generate(requests)
        await asyncio.gather(*map(take, requests))
        assert ended == ["b", "a"] and worker._generating == {}

    asyncio.run(scenario())
    assert worker._strategy.asked == ["a", "b"]  # type: ignore[attr-defined]


def test_an_aborted_request_has_an_empty_result_and_others_go_on() -> None:
    worker = RolloutWorker.__new__(RolloutWorker)
    worker._strategy, worker._generating, worker._num_experts = Echo(), {}, 8  # type: ignore[assignment]
    requests = {
        number: GenerateRequest((1,), (name,), (0,), name, Sampling(max_new_tokens=1), record_routes=False)
        for number, name in enumerate("aab")
    }

    async def scenario() -> list[GenerateResult]:
        await worker.begin_generate(requests)
        await worker.abort(0, None)  # before it ran at all
        results = asyncio.gather(*(worker.generated(number, None) for number in requests))
        for _ in range(3):
            await asyncio.sleep(0)
        await worker.abort(1, None)
        found = await results
        await worker.abort(2, None)
        return found

    assert asyncio.run(scenario()) == [GenerateResult(()), GenerateResult(()), GenerateResult((), {"b": "bad"})]
    assert worker._strategy.asked == ["a", "b"]  # type: ignore[attr-defined]
    assert worker._generating == {}


def test_a_mistake_of_the_program_is_not_taken_for_an_engine_that_does_not_start() -> None:
    worker = RolloutWorker.__new__(RolloutWorker)
    worker._strategy = Strategy(KeyError("x"))
    with pytest.raises(KeyError):
        asyncio.run(worker.restart())
