"""The samples of a step: a request for each prompt's group, and their results."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from roll_r3.cluster.engine_pool import EnginePool
from roll_r3.config.derived import sampling
from roll_r3.config.pipeline import RLVRConfig
from roll_r3.data.prompts import Prompt
from roll_r3.strategies.base import GenerateRequest, GenerateResult


def group_requests(config: RLVRConfig, prompts: Sequence[Prompt], step: int) -> list[GenerateRequest]:
    """Return a request per prompt. Ids and seeds follow from the configuration, the step and the prompt's place."""
    group, settings = config.num_return_sequences_in_group, sampling(config)
    seeds = np.random.default_rng((config.seed, step)).integers(1 << 31, size=(len(prompts), group))
    return [
        GenerateRequest(
            prompt_ids=prompt.token_ids,
            sample_ids=tuple(f"step{step}/prompt{i}/sample{j}" for j in range(group)),
            seeds=tuple(int(s) for s in seeds[i]),
            group_id=f"step{step}/prompt{i}",
            sampling=settings,
            record_routes=config.actor_infer.router_replay.mode == "R3",
        )
        for i, prompt in enumerate(prompts)
    ]


def sample_all(pool: EnginePool, requests: Sequence[GenerateRequest]) -> list[GenerateResult]:
    """Submit all requests and wait for all; results in the order of `requests`.

    Raises:
        EngineError: an engine went down more often than the configuration allows in a step.
        WorkerError: a worker failed or died.
    """
    assert not pool.in_flight, "results of other requests would be taken for these"
    tickets = pool.submit(requests)
    results: dict[int, GenerateResult] = {}
    while len(results) < len(tickets):
        results |= {done.ticket.number: done.result for done in pool.completed()}
    return [results[ticket.number] for ticket in tickets]
