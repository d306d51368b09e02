"""Rollout by one vLLM server."""

from __future__ import annotations

import json
import logging
import os

from roll_r3.config.engine_role import EngineRole
from roll_r3.config.findings.readable import readable
from roll_r3.config.strategies import VllmConfig
from roll_r3.engines.client import ServerClient
from roll_r3.engines.parts import Parts
from roll_r3.engines.server import ServerRollout
from roll_r3.engines.vllm.codec import VllmCodec, read_cache_page, read_preemptions, read_weight_version
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
from roll_r3.models.checkpoint_files import resolve_checkpoint
from roll_r3.models.facts import ModelFacts
from roll_r3.models.size import Shape, shape_of
from roll_r3.strategies.base import EnginePlace

logger = logging.getLogger(__name__)

_CALL_S = 60.0
_WEIGHT_INFO = "/weight_info"
_METRICS = "/metrics"


class VllmRollout(ServerRollout):
    """One engine. A sample's seed decides its tokens, given the weights and the other samples in its batches."""

    def __init__(self, role: EngineRole, place: EnginePlace) -> None:
        settings = role.settings
        assert isinstance(settings, VllmConfig), "the registry gives each strategy its own settings"
        codec = VllmCodec(
            role.checkpoint,
            trust_remote_code=role.trust_remote_code,
            returns_kept=role.sampling.return_kept,
        )
        super().__init__(role, place, Parts(VllmProgram(role, place, settings), codec, VllmStatus(), settings))


class VllmProgram:
    """vLLM's server program. Implements `roll_r3.engines.parts.Program`."""

    engine = "vLLM"
    package = "vllm"
    keyed_path = _WEIGHT_INFO

    def __init__(self, role: EngineRole, place: EnginePlace, settings: VllmConfig) -> None:
        self._role, self._place, self._settings = role, place, settings

    @property
    def python(self) -> str:
        return self._settings.python

    def problems(self, facts: ModelFacts) -> list[str]:
        problems = args_that_lose_routes(self._settings) + refused_server_args(self._settings)
        if self._place.device == "cpu" and (lack := cpu_lacks_a_kernel(self._shape())):
            problems.append(f"on a CPU vLLM cannot run this model: {lack}")
        return problems

    def _shape(self) -> Shape:
        return shape_of(json.loads((resolve_checkpoint(self._role.checkpoint) / "config.json").read_text()))

    def check_version(self, text: str) -> str | None:
        return check_version(text, device=self._place.device)

    def command(self, checkpoint: str, facts: ModelFacts, port: int) -> list[str]:
        arguments = server_arguments(
            self._settings,
            model_path=checkpoint,
            trust_remote_code=self._role.trust_remote_code,
            device=self._place.device,
            port=port,
            seed=self._role.seed + self._place.engine_index,
            sampling=self._role.sampling,
            context_length=min(self._role.context_length, facts.context_length),
            record_routes=self._role.record_routes,
            shape=self._shape(),
        )
        return server_command(self._settings, arguments)

    def environment(self, key: str) -> dict[str, str]:
        if names := [name for name in settings_left_out(os.environ) if name not in self._role.environment]:
            logger.warning(
                "engine %d (vLLM): its server does not inherit %s", self._place.engine_index, ", ".join(names)
            )
        return server_environment(
            self._settings,
            os.environ,
            self._role.environment,
            device=self._place.device,
            gpu_ids=self._place.gpu_ids,
            key=key,
        )


class VllmStatus:
    """State of a vLLM server. Implements `roll_r3.engines.parts.Status`."""

    async def prepare(self, client: ServerClient) -> None:
        """Number the loaded weights 0. vLLM calls them "default"."""
        await client.post("/update_weight_version", {"new_version": "0"}, _CALL_S)

    async def why_closed(self, client: ServerClient, weight_version: int) -> str:
        """Compare weight versions. During an update, or after a failed one, requests would wait in a paused engine."""
        version = read_weight_version(await client.get(_WEIGHT_INFO, _CALL_S))
        if version != str(weight_version):
            return f"the answer would come from weights of version {readable(version)}, not {weight_version}"
        return ""

    async def recomputed(self, client: ServerClient) -> int:
        """Count preemptions. vLLM's answers give what was cached when a sample began, not whether it began again."""
        return read_preemptions(await client.get(_METRICS, _CALL_S))

    async def abort(self, client: ServerClient, request_id: str) -> None:
        """Do nothing: vLLM ends a request with its connection."""

    async def cache_page(self, client: ServerClient) -> int:
        return read_cache_page(await client.get(_METRICS, _CALL_S))
