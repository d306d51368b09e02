"""Rollout by one SGLang server."""

from __future__ import annotations

import os
import sys

from roll_r3.config.engine_role import EngineRole
from roll_r3.config.strategies import SglangConfig
from roll_r3.engines.client import ServerClient
from roll_r3.engines.parts import Parts
from roll_r3.engines.server import ServerRollout
from roll_r3.engines.sglang.codec import SglangCodec, read_cache_page
from roll_r3.engines.sglang.server import (
    args_that_lose_routes,
    refused_server_args,
    server_arguments,
    server_command,
    server_environment,
)
from roll_r3.engines.sglang.version import RETURNS_KEPT, check_version, returns_kept
from roll_r3.models.facts import ModelFacts
from roll_r3.strategies.base import EnginePlace

_CALL_S = 60.0
_SERVER_INFO = "/server_info"
"""Path of the server's state. The scheduler answers it, between two batches."""


class SglangRollout(ServerRollout):
    """One engine.

    On a CPU a sample's seed decides its tokens, given the weights and, in the last bits of bf16, the other samples in
    its batches. On a GPU SGLang uses the seed only with `server_args: {enable_deterministic_inference: true}`.
    """

    def __init__(self, role: EngineRole, place: EnginePlace) -> None:
        settings = role.settings
        assert isinstance(settings, SglangConfig), "the registry gives each strategy its own settings"
        codec = SglangCodec()
        program = SglangProgram(role, place, settings, codec)
        super().__init__(role, place, Parts(program, codec, SglangStatus(), settings))


class SglangProgram:
    """SGLang's server program. Implements `roll_r3.engines.parts.Program`."""

    engine = "SGLang"
    package = "sglang"
    keyed_path = _SERVER_INFO

    def __init__(self, role: EngineRole, place: EnginePlace, settings: SglangConfig, codec: SglangCodec) -> None:
        self._role, self._place, self._settings = role, place, settings
        self._codec = codec

    @property
    def python(self) -> str:
        return self._settings.python or sys.executable

    def problems(self, facts: ModelFacts) -> list[str]:
        return [
            *args_that_lose_routes(self._settings, record_routes=self._role.record_routes),
            *refused_server_args(self._settings),
        ]

    def check_version(self, text: str) -> str | None:
        """As `Program.check_version`; a release without kept tokens is not asked for them."""
        warning = check_version(text)
        self._codec.returns_kept = returns_kept(text)
        if self._role.sampling.return_kept and not self._codec.returns_kept:
            return (
                f"SGLang {text} does not return kept tokens for certain ({RETURNS_KEPT} does): log-probabilities are "
                "of the whole distribution"
            )
        return warning

    def command(self, checkpoint: str, facts: ModelFacts, port: int) -> list[str]:
        arguments = server_arguments(
            self._settings,
            model_path=checkpoint,
            trust_remote_code=self._role.trust_remote_code,
            device=self._place.device,
            port=port,
            seed=self._role.seed + self._place.engine_index,
            context_length=min(self._role.context_length, facts.context_length),
            record_routes=self._role.record_routes,
            fp32_lm_head=self._role.fp32_lm_head,
            kept_top_k=self._role.sampling.top_k if self._role.sampling.return_kept else 0,
        )
        return server_command(self._settings, arguments)

    def environment(self, key: str) -> dict[str, str]:
        return server_environment(
            self._settings,
            os.environ,
            self._role.environment,
            device=self._place.device,
            gpu_ids=self._place.gpu_ids,
            key=key,
        )


class SglangStatus:
    """State of an SGLang server. Implements `roll_r3.engines.parts.Status`."""

    async def prepare(self, client: ServerClient) -> None:
        """Do nothing: an answering server is ready."""

    async def why_closed(self, client: ServerClient, weight_version: int) -> str:
        return ""

    async def recomputed(self, client: ServerClient) -> int:
        return 0  # each answer has its own count

    async def abort(self, client: ServerClient, request_id: str) -> None:
        # SGLang looks for a closed connection every 4 seconds only
        await client.post("/abort_request", {"rid": request_id}, _CALL_S)

    async def cache_page(self, client: ServerClient) -> int:
        return read_cache_page(await client.get(_SERVER_INFO, _CALL_S))
