"""Groups are assembled in order, failures are retried under the same id, and nothing appears twice."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Coroutine
from typing import Any

import pytest

from roll_r3.batch.trajectory import Trajectory
from roll_r3.config.sampling_settings import Sampling
from roll_r3.config.strategies import SglangConfig
from roll_r3.engines.parts import Parts
from roll_r3.engines.sample import Asked, Sample, SampleError, SampleRequest
from roll_r3.engines.sampler import Sampler
from roll_r3.errors import EngineError, RouteError
from roll_r3.strategies.base import GenerateRequest, GenerateResult

SAMPLING = Sampling(max_new_tokens=8)
REQUESTS = [
    GenerateRequest(
        prompt_ids=(1, 2),
        sample_ids=("a0", "a1"),
        seeds=(10, 11),
        group_id="group",
        sampling=SAMPLING,
        record_routes=True,
    ),
    GenerateRequest(
        prompt_ids=(3,),
        sample_ids=("b0", "b1", "b2"),
        seeds=(20, 21, 22),
        group_id="group",
        sampling=SAMPLING,
        record_routes=True,
    ),
]


class Engine:
    """Engine with the seed as the only token of an answer, and a given number of failures."""

    def __init__(self, failures: dict[str, list[Exception]] | None = None) -> None:
        self.failures = failures or {}
        self.asked: Counter[tuple[str, int]] = Counter()

    async def ask(self, wanted: SampleRequest) -> Sample:
        sample_id, seed = wanted.sample_id, wanted.seed
        assert (wanted.first_row, wanted.cached_rows, wanted.cache_key) == (0, 0, "")
        self.asked[sample_id, seed] += 1
        await asyncio.sleep(0.002 * (30 - seed))  # later samples come back first
        if self.failures.get(sample_id):
            raise self.failures[sample_id].pop(0)
        return Sample(trajectory(wanted.prompt_ids, sample_id, seed), from_cache=True)


def trajectory(prompt_ids: tuple[int, ...], sample_id: str, seed: int) -> Trajectory:
    return Trajectory.one_turn(
        sample_id,
        "group",
        prompt_ids=prompt_ids,
        response_ids=[seed],
        log_probs=[-1.0],
        version=0,
        finish_reason="stop",
    )


class Sharing:
    """Sharing of the second prompt's rows with a given result; by default no rows are shared."""

    def __init__(self, back: tuple[str, ...] | SampleError | EngineError | None = None) -> None:
        self.back = back

    def shareable_rows(self, request: GenerateRequest) -> int:
        return 7 if self.back is not None and request is REQUESTS[1] else 0

    async def share(self, request: GenerateRequest, rows: int) -> dict[str, Trajectory]:
        assert rows == 7
        if isinstance(self.back, SampleError | EngineError):
            raise self.back
        return {sample_id: trajectory(request.prompt_ids, sample_id, 99) for sample_id in self.back or ()}


def sampler(engine: Engine, max_retries: int, sharing: Sharing | None) -> Sampler:
    settings = SglangConfig(max_retries=max_retries)
    nothing: Any = None
    made = Sampler(Parts(nothing, nothing, nothing, settings), nothing, nothing, nothing, running_requests=8)
    made.ask = engine.ask  # type: ignore[method-assign]
    made.sharing = sharing or Sharing()  # type: ignore[assignment]
    return made


def run(engine: Engine, max_retries: int = 2, sharing: Sharing | None = None) -> list[GenerateResult]:
    async def all_at_once() -> list[GenerateResult]:
        return await asyncio.gather(*map(sampler(engine, max_retries, sharing).generate, REQUESTS))

    return asyncio.run(all_at_once())


def test_results_come_in_the_order_asked_for() -> None:
    results = run(Engine())
    assert [[t.sample_id for t in r.trajectories] for r in results] == [["a0", "a1"], ["b0", "b1", "b2"]]
    assert [t.response_ids.tolist() for t in results[1].trajectories] == [[20], [21], [22]]
    assert all(not r.dropped and r.retries == 0 for r in results)


def test_a_failed_sample_is_asked_again_under_its_id_and_seed() -> None:
    engine = Engine({"b1": [SampleError("HTTP 500"), RouteError("a row too few")]})
    results = run(engine)
    assert [t.sample_id for t in results[1].trajectories] == ["b0", "b1", "b2"]
    assert (results[0].retries, results[1].retries) == (0, 2)
    assert engine.asked["b1", 21] == 3
    assert sum(engine.asked.values()) == 7


def test_a_sample_that_keeps_failing_is_dropped_with_its_last_reason() -> None:
    engine = Engine({"a0": [SampleError("first"), SampleError("second"), RouteError("third")]})
    results = run(engine)
    assert [t.sample_id for t in results[0].trajectories] == ["a1"]
    assert results[0].dropped == {"a0": "third"}
    assert results[0].retries == 2


def test_no_retries_means_one_attempt() -> None:
    results = run(Engine({"a0": [SampleError("once")]}), max_retries=0)
    assert results[0].dropped == {"a0": "once"}
    assert results[0].retries == 0


def test_what_an_engine_that_died_did_not_bring_is_lost_and_the_rest_kept() -> None:
    engine = Engine({"a0": [EngineError("died")], "b1": [SampleError("HTTP 500"), EngineError("died")]})
    results = run(engine)
    assert [[t.sample_id for t in r.trajectories] for r in results] == [["a1"], ["b0", "b2"]]
    assert [(r.lost, r.dropped, r.retries) for r in results] == [(("a0",), {}, 0), (("b1",), {}, 1)]
    assert engine.asked["a0", 10] == 1, "a dead engine is not asked again"


@pytest.mark.parametrize("back", [(), ("b1",)])
def test_a_shared_group_that_is_lost_costs_no_retries(back: tuple[str, ...]) -> None:
    dead = {sample_id: [EngineError("died")] for sample_id in ("b0", "b1", "b2")}
    results = run(Engine(dead), sharing=Sharing(back))
    assert [t.sample_id for t in results[1].trajectories] == list(back)
    assert results[1].lost == tuple(sample_id for sample_id in ("b0", "b1", "b2") if sample_id not in back)
    assert results[1].retries == 0


def test_a_group_whose_prompt_met_a_dead_engine_is_asked_for_and_lost() -> None:
    dead = {sample_id: [EngineError("died")] for sample_id in ("b0", "b1", "b2")}
    results = run(Engine(dead), sharing=Sharing(EngineError("died")))
    assert results[1].lost == ("b0", "b1", "b2")


def test_ids_and_seeds_must_pair() -> None:
    request = GenerateRequest(
        prompt_ids=(1,), sample_ids=("a", "b"), seeds=(1,), group_id="group", sampling=SAMPLING, record_routes=True
    )
    with pytest.raises(ValueError, match="2 sample ids came with 1 seeds"):
        asyncio.run(sampler(Engine(), 0, None).generate(request))


def test_a_group_that_shared_its_prompt_is_asked_for_nothing_more() -> None:
    engine = Engine()
    results = run(engine, sharing=Sharing(("b0", "b1", "b2")))
    assert [t.response_ids.tolist() for t in results[1].trajectories] == [[99]] * 3
    assert results[1].retries == 0
    assert {sample_id for sample_id, _ in engine.asked} == {"a0", "a1"}


def test_what_sharing_did_not_bring_is_asked_for_alone_and_keeps_its_retries() -> None:
    engine = Engine({"b2": [SampleError("first")]})
    results = run(engine, max_retries=1, sharing=Sharing(("b1",)))
    assert [t.response_ids.tolist() for t in results[1].trajectories] == [[20], [99], [22]]
    assert results[1].retries == 3, "b0 and b2, which had been asked for, and b2 once more"
    assert not results[1].dropped


def test_a_prompt_that_the_cache_did_not_take_costs_nobody_a_retry() -> None:
    results = run(Engine(), max_retries=0, sharing=Sharing(SampleError("HTTP 500")))
    assert [t.response_ids.tolist() for t in results[1].trajectories] == [[20], [21], [22]]
    assert results[1].retries == 0


class Server:
    """Server that never answers; it records what it is asked and told to end."""

    def __init__(self) -> None:
        self.began = asyncio.Event()
        self.log: list[tuple[str, str]] = []

    path = "/generate"
    num_layers = top_k = 1

    def kept_limit(self, asked: Asked) -> int:
        return 0

    def request(self, asked: Asked) -> dict[str, Any]:
        return {"id": asked.request_id}

    async def post(self, path: str, request: dict[str, Any], *limits: Any) -> bytes:
        self.log.append((path, request["id"]))
        self.began.set()
        await asyncio.Event().wait()
        return b""

    async def abort(self, client: Any, request_id: str) -> None:
        self.log.append(("abort", request_id))
        raise SampleError("no connection")

    def require_running(self) -> None: ...

    async def until_exit(self, work: Coroutine[Any, Any, Any]) -> Any:
        return await work


def test_a_cancelled_request_is_ended_at_the_server_under_its_own_id() -> None:
    async def scenario() -> Server:
        server: Any = Server()
        settings = SglangConfig()
        made = Sampler(Parts(server, server, server, settings), server, server, server, running_requests=8)
        made.sharing = Sharing()  # type: ignore[assignment]
        task = asyncio.create_task(made.generate(REQUESTS[0]))
        await server.began.wait()
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert made._slots.free == made._slots.total
        return server

    asked = asyncio.run(scenario()).log
    names = [name for path, name in asked if path == "/generate"]
    assert len(set(names)) == 2
    assert all(len(name) == 32 for name in names), "no id begins like another: SGLang ends all that begin so"
    assert sorted(name for path, name in asked if path == "abort") == sorted(names)
