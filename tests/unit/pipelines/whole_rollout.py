"""All results of a pool at once, for tests of single rollouts."""

from __future__ import annotations

from collections.abc import Sequence

from roll_r3.cluster.engine_pool import EnginePool
from roll_r3.strategies.base import GenerateRequest, GenerateResult


def sample_all(pool: EnginePool, requests: Sequence[GenerateRequest]) -> list[GenerateResult]:
    """Submit all requests and wait for all; results in the order of `requests`."""
    tickets = pool.submit(requests)
    results: dict[int, GenerateResult] = {}
    while len(results) < len(tickets):
        results |= {done.ticket.number: done.result for done in pool.completed()}
    return [results[ticket.number] for ticket in tickets]
