"""Rollout by one SGLang server."""

from __future__ import annotations

import os
import sys
from typing import Any

from roll_r3.config.strategies import SglangConfig
from roll_r3.engines.answers import Asked
from roll_r3.engines.client import ServerClient
from roll_r3.engines.sampling import Sample
from roll_r3.engines.server import ServerRollout
from roll_r3.engines.sglang.payload import read_cache_page, read_sample
from roll_r3.engines.sglang.server import (
    args_that_lose_routes,
    refused_server_args,
    server_arguments,
    server_command,
    server_environment,
)
from roll_r3.engines.sglang.version import check_version
from roll_r3.models.facts import ModelFacts

_CALL_S = 60.0


class SglangRollout(ServerRollout[SglangConfig]):
    """One engine.

    On a CPU a sample's seed decides its tokens, given the weights and, in the last bits of bf16, what else is in its
    batches. On a GPU SGLang looks at it only with `server_args: {enable_deterministic_inference: true}`.
    """

    engine = "SGLang"
    package = "sglang"
    generate_path = "/generate"
    keyed_path = "/server_info"  # whose internal state the scheduler tells, between two batches

    @property
    def python(self) -> str:
        return self._config.python or sys.executable

    def problems(self, facts: ModelFacts) -> list[str]:
        return args_that_lose_routes(self._config, record_routes=self._record_routes) + refused_server_args(
            self._config
        )

    def check_version(self, text: str) -> str | None:
        return check_version(text)

    def command(self, checkpoint: str, facts: ModelFacts, port: int) -> list[str]:
        arguments = server_arguments(
            self._config,
            model_path=checkpoint,
            trust_remote_code=self._model_args.trust_remote_code,
            device=self._device,
            port=port,
            seed=self._seed,
            context_length=min(self._wanted_context, facts.context_length),
            record_routes=self._record_routes,
            fp32_lm_head=self._fp32_lm_head,
        )
        return server_command(self._config, arguments)

    def environment(self) -> dict[str, str]:
        return server_environment(self._config, os.environ, device=self._device, gpu_ids=self._gpu_ids, key=self._key)

    async def cache_page(self, client: ServerClient) -> int:
        return read_cache_page(await client.get("/server_info", _CALL_S))

    def request(self, asked: Asked) -> dict[str, Any]:
        request: dict[str, Any] = {
            "input_ids": list(asked.sample.prompt_ids),
            "sampling_params": {
                "max_new_tokens": asked.max_new_tokens,
                "temperature": self._generating.temperature,
                "top_p": self._generating.top_p,
                "top_k": self._generating.top_k,
                "sampling_seed": asked.sample.seed,
                "skip_special_tokens": False,
            },
            "return_logprob": True,
        }
        if self._generating.stop_token_ids:
            request["sampling_params"]["stop_token_ids"] = list(self._generating.stop_token_ids)
        if asked.stop_strings:
            request["sampling_params"]["stop"] = list(asked.stop_strings)
        if asked.record_routes:
            request |= {"return_routed_experts": True, "routed_experts_start_len": asked.sample.first_row}
        if asked.sample.cache_key:
            request["extra_key"] = asked.sample.cache_key
        return request

    def read(self, body: bytes, asked: Asked, facts: ModelFacts) -> Sample:
        return read_sample(body, asked, facts)
