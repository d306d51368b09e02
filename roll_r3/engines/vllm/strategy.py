"""Rollout by one vLLM server."""

from __future__ import annotations

import asyncio
import json
import logging
import os
from typing import Any

from roll_r3.config.readable import readable
from roll_r3.config.strategies import VllmConfig
from roll_r3.engines.answers import Asked
from roll_r3.engines.client import ServerClient
from roll_r3.engines.sampling import Sample
from roll_r3.engines.server import ServerRollout
from roll_r3.engines.vllm.payload import (
    read_cache_page,
    read_preemptions,
    read_sample,
    read_weight_version,
)
from roll_r3.engines.vllm.server import (
    args_that_lose_routes,
    cpu_lacks_a_kernel,
    refused_server_args,
    server_arguments,
    server_command,
    server_environment,
    settings_left_out,
)
from roll_r3.engines.vllm.version import check_version
from roll_r3.models.checkpoint import resolve_checkpoint
from roll_r3.models.facts import ModelFacts
from roll_r3.models.size import Shape, shape_of

logger = logging.getLogger(__name__)

_CALL_S = 60.0


class VllmRollout(ServerRollout[VllmConfig]):
    """One engine. A sample's seed decides its tokens, given the weights and what shares its batches."""

    engine = "vLLM"
    package = "vllm"
    generate_path = "/inference/v1/generate"
    keyed_path = "/weight_info"
    _end_tokens: frozenset[int] = frozenset()
    """Known once the server answers."""

    @property
    def python(self) -> str:
        return self._config.python

    def problems(self, facts: ModelFacts) -> list[str]:
        problems = args_that_lose_routes(self._config) + refused_server_args(self._config)
        if self._device == "cpu" and (lack := cpu_lacks_a_kernel(self._shape())):
            problems.append(f"on a CPU vLLM cannot run this model: {lack}")
        return problems

    def _shape(self) -> Shape:
        return shape_of(json.loads((resolve_checkpoint(self._model_path) / "config.json").read_text()))

    def check_version(self, text: str) -> str | None:
        return check_version(text, device=self._device)

    def command(self, checkpoint: str, facts: ModelFacts, port: int) -> list[str]:
        arguments = server_arguments(
            self._config,
            model_path=checkpoint,
            trust_remote_code=self._model_args.trust_remote_code,
            device=self._device,
            port=port,
            seed=self._seed,
            temperature=self._generating.temperature,
            context_length=min(self._wanted_context, facts.context_length),
            record_routes=self._record_routes,
            shape=self._shape(),
        )
        return server_command(self._config, arguments)

    def environment(self) -> dict[str, str]:
        if names := settings_left_out(os.environ):
            logger.warning("%s: its server does not inherit %s", self._name, ", ".join(names))
        return server_environment(self._config, os.environ, device=self._device, gpu_ids=self._gpu_ids, key=self._key)

    async def prepare(self, client: ServerClient) -> None:
        """Read the checkpoint's end tokens. vLLM calls the weights that it loaded "default"."""
        self._end_tokens = await asyncio.to_thread(self._read_end_tokens)
        await client.post("/update_weight_version", {"new_version": str(self._weight_version)}, _CALL_S)

    def _read_end_tokens(self) -> frozenset[int]:
        from roll_r3.models.hf.tokenizer import read_end_tokens, read_tokenizer  # seconds to import

        checkpoint = resolve_checkpoint(self._model_path)
        tokenizer = read_tokenizer(checkpoint, trust_remote_code=self._model_args.trust_remote_code)
        return read_end_tokens(checkpoint, tokenizer).union(self._generating.stop_token_ids)

    async def why_closed(self, client: ServerClient) -> str:
        """While an update is open, or after one that failed, requests would wait for an engine that is paused."""
        version = read_weight_version(await client.get("/weight_info", _CALL_S))
        if version != str(self._weight_version):
            return f"the answer would come from weights of version {readable(version)}, not {self._weight_version}"
        return ""

    async def recomputed(self, client: ServerClient) -> int:
        """Preemptions: vLLM's answers say what was cached when a sample began, not whether it had to begin again."""
        return read_preemptions(await client.get("/metrics", _CALL_S))

    async def cache_page(self, client: ServerClient) -> int:
        return read_cache_page(await client.get("/metrics", _CALL_S))

    def request(self, asked: Asked) -> dict[str, Any]:
        sample = asked.sample
        request: dict[str, Any] = {
            "token_ids": list(sample.prompt_ids),
            "sampling_params": {
                "max_tokens": asked.max_new_tokens,
                "temperature": self._generating.temperature,
                "top_p": self._generating.top_p,
                "top_k": self._generating.top_k,
                "seed": sample.seed,
                "logprobs": 0,  # of the sampled token alone
                "detokenize": False,
                "routed_experts_prompt_start": sample.first_row if asked.record_routes else len(sample.prompt_ids),
            },
        }
        if self._generating.stop_token_ids:
            request["sampling_params"]["stop_token_ids"] = list(self._generating.stop_token_ids)
        if sample.cache_key:
            request["cache_salt"] = sample.cache_key
        return request

    def read(self, body: bytes, asked: Asked, facts: ModelFacts) -> Sample:
        return read_sample(body, asked, facts, self._end_tokens)
