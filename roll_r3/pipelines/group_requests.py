"""Requests for the groups of a step."""

from __future__ import annotations

import zlib

import numpy as np

from roll_r3.config.derived import sampling
from roll_r3.config.pipeline import RLVRConfig
from roll_r3.data.prompts import Prompt
from roll_r3.strategies.base import GenerateRequest


class GroupRequests:
    """Requests of a step for one part of the data.

    Ids and seeds follow from the configuration, the step, the part and the prompt's place there. They do not depend on
    time, nor on the number of prompts requested together.
    """

    def __init__(self, config: RLVRConfig, step: int, part: str) -> None:
        """
        Args:
            part: name of the part; empty: all prompts.
        """
        self._group = config.num_return_sequences_in_group
        self._record_routes = config.actor_infer.router_replay.mode == "R3"
        self._sampling = sampling(config)
        key = (zlib.crc32(part.encode()),) if part else ()
        self._seeds = np.random.default_rng((config.seed, step, *key))
        self._prefix = f"step{step}/{part}/prompt" if part else f"step{step}/prompt"
        self._made = 0

    def next(self, prompt: Prompt) -> GenerateRequest:
        """Return the request for the group of the next prompt."""
        group_id = f"{self._prefix}{self._made}"
        self._made += 1
        return GenerateRequest(
            prompt_ids=prompt.token_ids,
            sample_ids=tuple(f"{group_id}/sample{j}" for j in range(self._group)),
            seeds=tuple(int(seed) for seed in self._seeds.integers(1 << 31, size=self._group)),
            group_id=group_id,
            sampling=self._sampling,
            record_routes=self._record_routes,
        )
