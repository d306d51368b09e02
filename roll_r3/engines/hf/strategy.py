"""Rollout by one transformers model on one device, in this process."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM

from roll_r3.batch.routes import RoutedExperts
from roll_r3.batch.trajectory import Trajectory
from roll_r3.config.derived import checkpoint_of, sampled_tokens
from roll_r3.config.pipeline import RLVRConfig
from roll_r3.config.strategies import HfInferConfig
from roll_r3.engines.hf.parameters import tensors_by_name
from roll_r3.engines.hf.receiver import WeightReceiver
from roll_r3.engines.hf.routers import RouteRecorder
from roll_r3.engines.hf.sampler import Job, Sampled, Stop, sample
from roll_r3.errors import ConfigError, EngineError, RouteError
from roll_r3.models.architectures import ARCHITECTURES
from roll_r3.models.checkpoint import resolve_checkpoint, safetensors_files
from roll_r3.models.facts import ModelFacts, read_facts
from roll_r3.models.hf.config import read_hf_config
from roll_r3.models.hf.head import compute_logits_in_fp32
from roll_r3.models.hf.norms import set_latent_epsilon
from roll_r3.models.hf.routers import find_routers
from roll_r3.models.hf.tokenizer import read_end_tokens, read_tokenizer
from roll_r3.replay.checks import check_log_probs, compact_routes
from roll_r3.strategies.base import GenerateRequest, GenerateResult
from roll_r3.weights.target import ServerTarget

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Asked:
    """A sample that was asked for."""

    job: Job
    outcome: asyncio.Future[Trajectory | str]
    """The checked trajectory, or why there is none."""

    def end(self, outcome: Trajectory | str) -> None:
        if not self.outcome.done():  # a caller that was cancelled waits no more
            self.outcome.set_result(outcome)

    def fail(self, error: Exception) -> None:
        if not self.outcome.done():
            self.outcome.set_exception(error)


class HfRollout:
    """One engine. Implements `roll_r3.strategies.base.RolloutStrategy`.

    Weight versions are as in `SglangRollout`: after a channel's `end` returned, `on_weights_updated` must be told the
    same number, and until both agree every sample is refused. An update waits for the batch that is being sampled.
    """

    def __init__(
        self,
        *,
        config: RLVRConfig,
        engine_index: int,
        device: str,
        gpu_ids: tuple[int, ...],
        log_path: Path,
        node_address: str = "127.0.0.1",
    ) -> None:
        """
        Args:
            config: the run's; this role is `config.actor_infer`.
            engine_index: number of this engine in the role; names it.
            device: "cpu" or "cuda", which is the one GPU that this process sees.
            gpu_ids: of no use here: there is no other process to tell.
            log_path: of no use here: this process has a log.
            node_address: where a trainer, perhaps on another node, reaches this process.
        """
        role = config.actor_infer
        settings = role.strategy_args.strategy_config
        assert isinstance(settings, HfInferConfig), "the registry gives each strategy its own settings"
        self._settings = settings
        self._model_args = role.model_args
        self._fp32_lm_head = config.fp32_lm_head
        self._model_path = checkpoint_of(config, "actor_infer")
        self._generating = role.generating_args
        self._max_new_tokens = sampled_tokens(config)
        self._record_routes = role.router_replay.mode == "R3"
        self._device = device
        self._node_address = node_address
        self._name = f"engine {engine_index} (transformers)"
        self._busy = threading.Lock()
        self._queue: list[_Asked] = []
        self._sampling: asyncio.Task[None] | None = None
        self._model: Any = None
        self._facts: ModelFacts | None = None
        self._recorder: RouteRecorder | None = None
        self._receiver: WeightReceiver | None = None
        self._stop_ids: frozenset[int] = frozenset()
        self._decode: Callable[[Sequence[int]], str] | None = None
        self._weight_version = 0
        self._weights_due = False

    async def start(self) -> None:
        """Load the model.

        Raises:
            ConfigError: a checkpoint whose routing facts cannot be read, whose routers are not known, or which lacks
                weights.
        """
        await asyncio.to_thread(self._load)

    def _load(self) -> None:
        checkpoint = resolve_checkpoint(self._model_path)
        facts = read_facts(checkpoint)
        model = _read_model(checkpoint, getattr(torch, self._settings.dtype)).to(self._device)
        if self._fp32_lm_head:
            compute_logits_in_fp32(model)
        routers = find_routers(model, facts.moe_layers)
        self._recorder = RouteRecorder(routers) if self._record_routes else None
        tokenizer = read_tokenizer(checkpoint, trust_remote_code=self._model_args.trust_remote_code)
        self._stop_ids = read_end_tokens(checkpoint, tokenizer)
        self._decode = lambda ids: str(tokenizer.decode(ids, skip_special_tokens=False))
        tensors = tensors_by_name(model, ARCHITECTURES[facts.model_type])
        self._receiver = WeightReceiver(tensors, self._busy, self._node_address)
        self._model, self._facts = model, facts
        logger.info("%s: %s on %s in %s", self._name, type(model).__name__, self._device, self._settings.dtype)

    async def generate(self, request: GenerateRequest) -> GenerateResult:
        """Sample a group, together with others that were asked for: `max_running_requests` samples at a time.

        Raises:
            EngineError: the engine is not running.
        """
        if self._model is None:
            raise EngineError(f"{self._name} is not running: start() comes first, and nothing after stop()")
        if self._weights_due:
            raise EngineError(f"{self._name} was started again and has the checkpoint's weights: an update comes first")
        seeds = dict(zip(request.sample_ids, request.seeds, strict=True))
        asked = [
            _Asked(Job(request.prompt_ids, i, seeds[i], request.group_id), asyncio.get_running_loop().create_future())
            for i in request.sample_ids
        ]
        self._queue += asked
        if self._sampling is None or self._sampling.done():
            self._sampling = asyncio.create_task(self._sample_queue())  # runs once all calls of this moment are queued
        outcomes = dict(zip(request.sample_ids, await asyncio.gather(*(one.outcome for one in asked)), strict=True))
        return GenerateResult(
            trajectories=tuple(outcome for outcome in outcomes.values() if isinstance(outcome, Trajectory)),
            dropped={sample_id: outcome for sample_id, outcome in outcomes.items() if isinstance(outcome, str)},
        )

    async def _sample_queue(self) -> None:
        """Sample batch after batch, until nothing is asked for."""
        size = self._settings.max_running_requests
        while self._queue:
            batch, self._queue = self._queue[:size], self._queue[size:]
            try:
                outcomes = await asyncio.to_thread(self._sample, [one.job for one in batch])
                ends = [outcomes[one.job.sample_id] for one in batch]
            except Exception as error:  # noqa: BLE001  # whoever asked raises it
                for one in (*batch, *self._queue):
                    one.fail(error)
                self._queue = []
                return
            for one, outcome in zip(batch, ends, strict=True):
                one.end(outcome)

    def _sample(self, jobs: Sequence[Job]) -> dict[str, Trajectory | str]:
        """Sample id -> the checked trajectory, or why there is none."""
        assert self._receiver is not None and self._decode is not None, "start() comes first"
        outcomes: dict[str, Trajectory | str] = {job.sample_id: problem for job in jobs if (problem := self._bad(job))}
        good = [job for job in jobs if job.sample_id not in outcomes]
        if not good:
            return outcomes
        with self._busy:  # weights do not change under a batch
            version, expected = self._receiver.version, self._weight_version
            if version != str(expected):
                refusal = f"the answer would come from weights of version {version}, not {expected}"
                return outcomes | {job.sample_id: refusal for job in good}
            sampled = sample(
                self._model,
                good,
                self._generating,
                max_new_tokens=self._max_new_tokens,
                stop=Stop(
                    self._stop_ids.union(self._generating.stop_token_ids), self._generating.stop_strings, self._decode
                ),
                recorder=self._recorder,
            )
        for job, result in zip(good, sampled, strict=True):
            try:
                outcomes[job.sample_id] = self._trajectory(job, result, expected)
            except RouteError as error:
                outcomes[job.sample_id] = str(error)
        return outcomes

    def _bad(self, job: Job) -> str:
        """Why a sample cannot be taken; empty when it can."""
        assert self._facts is not None, "start() comes first"
        if not job.prompt_ids:
            return "the prompt is empty"
        longest = len(job.prompt_ids) + self._max_new_tokens
        if longest > self._facts.context_length:
            return f"prompt and response may take {longest} tokens, the model was made for {self._facts.context_length}"
        return ""

    def _trajectory(self, job: Job, sampled: Sampled, version: int) -> Trajectory:
        """Raises RouteError: log-probabilities or routes break their contract."""
        log_probs_R = np.array(sampled.log_probs, np.float32)
        check_log_probs(log_probs_R, len(sampled.token_ids))
        rows = len(job.prompt_ids) + len(sampled.token_ids) - 1
        return Trajectory.one_turn(
            job.sample_id,
            job.group_id,
            prompt_ids=job.prompt_ids,
            response_ids=sampled.token_ids,
            log_probs=log_probs_R,
            version=version,
            finish_reason=sampled.finish_reason,
            routes=self._routes(sampled, rows) if self._record_routes else None,
        )

    def _routes(self, sampled: Sampled, rows: int) -> RoutedExperts:
        facts = self._facts
        assert facts is not None, "start() comes first"
        ids_MRK = torch.cat(sampled.routes, 1).numpy()
        ids_RLK = np.zeros((ids_MRK.shape[1], facts.num_layers, ids_MRK.shape[2]), np.int64)
        ids_RLK[:, list(facts.moe_layers)] = ids_MRK.transpose(1, 0, 2)
        return compact_routes(
            ids_RLK,
            num_rows=rows,
            num_layers=facts.num_layers,
            moe_layers=facts.moe_layers,
            num_experts=facts.num_experts,
            top_k=facts.top_k,
        )

    def weight_target(self) -> ServerTarget:
        if self._receiver is None:
            raise EngineError(f"{self._name} has no address yet: start() comes first")
        return ServerTarget(
            name=self._name,
            host=self._node_address,
            port=self._receiver.port,
            api_key=self._receiver.key,
            tp_size=1,
            dtype=self._settings.dtype,
        )

    async def on_weights_updated(self, version: int) -> None:
        """Samples must come from this weight version from now on. Call it when the weight channel's `end` returned."""
        self._weight_version, self._weights_due = version, False

    async def why_down(self, *, ask: bool) -> str:
        """Never: what ends this engine ends its process, and whoever calls it sees that."""
        return ""

    async def restart(self) -> None:
        """Load the checkpoint anew; nothing is sampled before `on_weights_updated`."""
        await self.stop()
        self._weight_version, self._weights_due = 0, True
        await self.start()

    async def stop(self, *, at_once: bool = False) -> None:
        """Let go of the model, which takes no time either way. Safe to call twice, and before `start`."""
        receiver, self._receiver, self._model, self._recorder = self._receiver, None, None, None
        if receiver is not None:
            await asyncio.to_thread(receiver.close)


def _read_model(checkpoint: Path, dtype: torch.dtype) -> Any:
    """transformers' own ...ForCausalLM with the checkpoint's weights, on the CPU.

    Raises:
        ConfigError: as `read_hf_config`, no safetensors (files of pickles are never read), or weights that are not
            there, in whose place transformers would put random ones.
    """
    safetensors_files(checkpoint)
    loading: Any = AutoModelForCausalLM.from_pretrained(
        checkpoint,
        config=read_hf_config(checkpoint),
        dtype=dtype,
        trust_remote_code=False,
        use_safetensors=True,
        output_loading_info=True,
    )
    model, loaded = loading
    if lacking := sorted(loaded["missing_keys"]):
        raise ConfigError(f"{checkpoint} lacks weights that make up {', '.join(lacking[:5])} ({len(lacking)} in all)")
    set_latent_epsilon(model)
    return model.eval().requires_grad_(False)
