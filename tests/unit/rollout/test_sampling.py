"""Groups are assembled in order, failures are asked again under the same id, and nothing appears twice."""

from __future__ import annotations

import asyncio
from collections import Counter

import numpy as np
import pytest

from roll_r3.batch.trajectory import Trajectory
from roll_r3.errors import EngineError, RouteError
from roll_r3.strategies.base import GenerateRequest, GenerateResult
from roll_r3.strategies.rollout.sampling import SampleError, sample_all

REQUESTS = [
    GenerateRequest(prompt_ids=(1, 2), sample_ids=("a0", "a1"), seeds=(10, 11)),
    GenerateRequest(prompt_ids=(3,), sample_ids=("b0", "b1", "b2"), seeds=(20, 21, 22)),
]


class Engine:
    """Answers with the seed as the only token; fails as often as told."""

    def __init__(self, failures: dict[str, list[Exception]] | None = None) -> None:
        self.failures = failures or {}
        self.asked: Counter[tuple[str, int]] = Counter()

    async def ask(self, prompt_ids: tuple[int, ...], sample_id: str, seed: int) -> Trajectory:
        self.asked[sample_id, seed] += 1
        await asyncio.sleep(0.002 * (30 - seed))  # later samples come back first
        if self.failures.get(sample_id):
            raise self.failures[sample_id].pop(0)
        return Trajectory(
            sample_id=sample_id,
            prompt_ids_P=np.array(prompt_ids, np.int32),
            response_ids_R=np.array([seed], np.int32),
            log_probs_R=np.array([-1.0], np.float32),
            finish_reason="stop",
            weight_versions=(0,),
        )


def run(engine: Engine, max_retries: int = 2) -> list[GenerateResult]:
    return asyncio.run(sample_all(REQUESTS, engine.ask, max_retries=max_retries))


def test_results_come_in_the_order_asked_for() -> None:
    results = run(Engine())
    assert [[t.sample_id for t in r.trajectories] for r in results] == [["a0", "a1"], ["b0", "b1", "b2"]]
    assert [t.response_ids_R.tolist() for t in results[1].trajectories] == [[20], [21], [22]]
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


def test_an_engines_death_is_no_samples_failure() -> None:
    with pytest.raises(EngineError):
        run(Engine({"a0": [EngineError("died")]}))


def test_ids_and_seeds_must_pair() -> None:
    request = GenerateRequest(prompt_ids=(1,), sample_ids=("a", "b"), seeds=(1,))
    with pytest.raises(ValueError, match="2 sample ids came with 1 seeds"):
        asyncio.run(sample_all([request], Engine().ask, max_retries=0))
