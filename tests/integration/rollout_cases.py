"""Helpers of all rollouts' tests: a configuration, an event loop, requests, and transformers as the reference."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Coroutine, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Generic, TypeVar

import numpy as np
import psutil
import torch
from epsilon import with_one_epsilon
from transformers import AutoModelForCausalLM

from roll_r3.batch.trajectory import Trajectory
from roll_r3.config.engine_role import EngineRole
from roll_r3.config.pipeline import RLVRConfig
from roll_r3.config.sampling_settings import Sampling
from roll_r3.engines.process import ServerProcess
from roll_r3.engines.sample import SampleRequest
from roll_r3.engines.sampler import Sampler
from roll_r3.engines.server import ServerRollout
from roll_r3.engines.sharing import PromptSharing
from roll_r3.engines.slots import Slots
from roll_r3.models.facts import read_facts
from roll_r3.models.hf.tokenizer import read_end_tokens, read_tokenizer
from roll_r3.strategies.base import GenerateRequest, GenerateResult, RolloutStrategy

T = TypeVar("T")
RolloutT = TypeVar("RolloutT", bound=RolloutStrategy)

RESPONSE_LENGTH = 12


def rollout_config(
    checkpoint: Path,
    strategy_name: str,
    settings: dict[str, Any],
    *,
    mode: str = "R3",
    generating: dict[str, Any] | None = None,
    model_args: dict[str, Any] | None = None,
    prompt_length: int = 64,
    response_length: int = RESPONSE_LENGTH,
) -> RLVRConfig:
    return RLVRConfig.model_validate(
        {
            "exp_name": "test",
            "pretrain": str(checkpoint),
            "prompt_length": prompt_length,
            "response_length": response_length,
            "actor_train": {},
            "actor_infer": {
                "router_replay": {"mode": mode},
                "model_args": model_args or {},
                "generating_args": generating or {},
                "strategy_args": {"strategy_name": strategy_name, "strategy_config": settings},
            },
        }
    )


STOPS = {"stop_token_ids": (3, 200), "stop_strings": ("a", "b", "c", "d", "e", "f", "g", "h", "AB")}
"""Stop tokens and strings over the byte vocabulary; about every second response of 12 tokens meets one."""


def assert_stopped_where_asked(results: Sequence[GenerateResult], checkpoint: Path) -> None:
    """Check that each response ends with the first stop token or completed stop string, and keeps it."""
    tokenizer = read_tokenizer(checkpoint, trust_remote_code=False)
    ends = read_end_tokens(checkpoint, tokenizer)
    seen = set()
    for t in trajectories(results).values():
        ids = t.response_ids.tolist()
        text = [tokenizer.decode(ids[: i + 1], skip_special_tokens=False) for i in range(len(ids))]
        by_string = [any(s in text[i] for s in STOPS["stop_strings"]) for i in range(len(ids))]
        by_token = [i in STOPS["stop_token_ids"] or i in ends for i in ids]
        met = [a or b for a, b in zip(by_string, by_token, strict=True)]
        assert t.finish_reason == ("stop" if any(met) else "length")
        assert not any(met[:-1]) and (any(met) or len(ids) == RESPONSE_LENGTH)
        seen |= {"string"} if by_string[-1] else {"token"} if by_token[-1] else {"length"}
    assert seen == {"string", "token", "length"}


SMALL_SERVER = {"max_total_tokens": 8192, "max_running_requests": 64, "startup_timeout": 400}
"""Settings common to both servers."""


def one_group(prompt_ids: tuple[int, ...], sample_ids: tuple[str, ...], seeds: tuple[int, ...]) -> GenerateRequest:
    """A group; `generate` fills in the settings of the engine's role."""
    return GenerateRequest(prompt_ids, sample_ids, seeds, "group", Sampling(RESPONSE_LENGTH), record_routes=True)


async def generate(
    rollout: RolloutStrategy, requests: Sequence[GenerateRequest], **sampling: Any
) -> list[GenerateResult]:
    """Request many groups at once, with the engine's settings and these changes; results come in request order."""
    role: EngineRole = rollout._role  # type: ignore[attr-defined]
    settings = replace(role.sampling, **sampling)
    asked = [replace(one, sampling=settings, record_routes=role.record_routes) for one in requests]
    return await asyncio.gather(*map(rollout.generate, asked))


async def evaluate(
    rollout: RolloutStrategy, requests: Sequence[GenerateRequest], **sampling: Any
) -> list[GenerateResult]:
    """Request many groups at once as an evaluation does: without routes, with a key of its own."""
    settings = Sampling(RESPONSE_LENGTH, **sampling)
    asked = [replace(one, sampling=settings, record_routes=False, cache_key="evaluation") for one in requests]
    return await asyncio.gather(*map(rollout.generate, asked))


class Rollout(Generic[RolloutT]):
    """A strategy and its event loop."""

    def __init__(self, rollout: RolloutT) -> None:
        self.rollout = rollout
        self.loop = asyncio.new_event_loop()

    def run(self, work: Coroutine[Any, Any, T], timeout_s: float = 900.0) -> T:
        return self.loop.run_until_complete(asyncio.wait_for(work, timeout_s))

    def generate(self, requests: Sequence[GenerateRequest], **sampling: Any) -> list[GenerateResult]:
        return self.run(generate(self.rollout, requests, **sampling))

    def close(self) -> None:
        self.run(self.rollout.stop())
        self.loop.close()


def group_members(server: ServerProcess) -> list[psutil.Process]:
    """Return live processes of the server's group; a zombie is dead and only waits for its parent."""
    found = []
    for process in psutil.process_iter():
        try:
            if os.getpgid(process.pid) == server.pid and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except (ProcessLookupError, psutil.NoSuchProcess):
            continue
    return found


def requests(num_prompts: int, samples: int, *, first_seed: int = 100) -> list[GenerateRequest]:
    """Return requests with prompts of different lengths over the byte vocabulary; every sample has its own seed."""
    draw = np.random.default_rng(0)
    made = []
    for prompt in range(num_prompts):
        ids = tuple(int(token) for token in draw.integers(0, 256, size=3 + prompt % 7))
        seeds = tuple(first_seed + prompt * samples + sample for sample in range(samples))
        made.append(one_group(ids, tuple(f"p{prompt}/s{sample}" for sample in range(samples)), seeds))
    return made


def long_requests(
    num: int, samples: int = 1, length: int = 150, first_seed: int = 1, common: int = 0
) -> list[GenerateRequest]:
    """Return requests with prompts of one length; their first `common` tokens are equal."""
    draw = np.random.default_rng(length)
    begin = tuple(int(token) for token in draw.integers(0, 256, size=common))
    return [
        one_group(
            begin + tuple(int(token) for token in draw.integers(0, 256, size=length - common)),
            tuple(f"long{prompt}/s{sample}" for sample in range(samples)),
            tuple(first_seed + prompt * samples + sample for sample in range(samples)),
        )
        for prompt in range(num)
    ]


def one_by_one(requests: Sequence[GenerateRequest]) -> list[GenerateRequest]:
    """Split requests: each sample becomes its prompt's only one."""
    return [
        one_group(request.prompt_ids, (sample_id,), (seed,))
        for request in requests
        for sample_id, seed in zip(request.sample_ids, request.seeds, strict=True)
    ]


class Sent:
    """Recorder of a rollout's requests to its server, and of the answers' sizes in bytes."""

    def __init__(self, rollout: ServerRollout) -> None:
        client = rollout._client
        assert client is not None
        self.requests: list[dict[str, Any]] = []
        self.num_bytes: list[int] = []
        self._client, self._post = client, client.post

    def __enter__(self) -> Sent:
        async def post(path: str, request: dict[str, Any], timeout_s: float, *limit: int) -> bytes:
            body = await self._post(path, request, timeout_s, *limit)
            self.requests.append(request)
            self.num_bytes.append(len(body))
            return body

        self._client.post = post  # type: ignore[method-assign]
        return self

    def __exit__(self, *error: object) -> None:
        self._client.post = self._post  # type: ignore[method-assign]


class Evicting(PromptSharing):
    """Prompt sharing with eviction: after each cached prompt, other requests push it out of the cache."""

    def __init__(self, sampler: Sampler, others: Sequence[GenerateRequest]) -> None:
        super().__init__(sampler.ask, self._prime_and_evict, sampler.recomputed, Slots(64), running_requests=64)
        self._sampler = sampler
        self._others = others
        self.engine_keeps(sampler.sharing._page)

    async def _prime_and_evict(self, wanted: SampleRequest) -> None:
        await self._sampler.prime(wanted)
        for request in one_by_one(self._others):
            await self._sampler.prime(SampleRequest(request.prompt_ids, "other", 0, wanted.sampling))


def trajectories(results: Sequence[GenerateResult]) -> dict[str, Trajectory]:
    assert all(not result.dropped for result in results), [result.dropped for result in results]
    return {t.sample_id: t for result in results for t in result.trajectories}


class Reference:
    """transformers' forward in fp32 over a whole sequence: no cache, no batching, no project code."""

    def __init__(self, checkpoint: Path, temperature: float = 1.0) -> None:
        self._model = with_one_epsilon(AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).eval())
        self._temperature = temperature
        self._chosen: list[torch.Tensor] = []
        for layer in read_facts(checkpoint).moe_layers:
            gate = self._model.model.layers[layer].mlp.gate
            gate.register_forward_hook(lambda module, args, output: self._chosen.append(output[2]))

    def log_probs(self, trajectory: Trajectory) -> np.ndarray:
        """Return log-probabilities of the response tokens. [R]"""
        return self._of_response(trajectory, self._forward(trajectory).logits)

    def below_best(self, trajectory: Trajectory) -> np.ndarray:
        """Return the distance of each response token from the likeliest one, in nats. [R]"""
        logits_1TV = self._forward(trajectory).logits
        best_TV = torch.log_softmax(logits_1TV[0].double() / self._temperature, -1).amax(-1)
        first = len(trajectory.prompt_ids) - 1
        return best_TV[first:-1].numpy() - self._of_response(trajectory, logits_1TV)

    def log_probs_and_routes(self, trajectory: Trajectory) -> tuple[np.ndarray, np.ndarray]:
        """Return ([R] of the response tokens, top-k ids [layers, T - 1, k] of the logits, in the router's order).

        For routers that choose by their logits alone; no hook is used.
        """
        output = self._forward(trajectory, output_router_logits=True)
        top_k = self._model.config.num_experts_per_tok
        routes = torch.stack([torch.topk(logits, top_k, -1).indices for logits in output.router_logits])
        return self._of_response(trajectory, output.logits), routes[:, :-1].numpy()

    def log_probs_and_experts(self, trajectory: Trajectory) -> tuple[np.ndarray, np.ndarray]:
        """Same as `log_probs_and_routes`, for any architecture: reads the output of each MoE layer's router."""
        self._chosen.clear()
        log_probs_R = self.log_probs(trajectory)
        return log_probs_R, torch.stack(self._chosen)[:, :-1].numpy()

    @torch.no_grad()
    def _forward(self, trajectory: Trajectory, **options: Any) -> Any:
        ids = torch.tensor(trajectory.token_ids_T).long()
        return self._model(ids[None], **options)

    def logits(self, trajectory: Trajectory) -> torch.Tensor:
        """Return the logits of the response tokens over the temperature, fp64 [R, V]."""
        logits_1TV = self._forward(trajectory).logits
        return logits_1TV[0, len(trajectory.prompt_ids) - 1 : -1].double() / self._temperature

    def _of_response(self, trajectory: Trajectory, logits_1TV: torch.Tensor) -> np.ndarray:
        labels_R = torch.tensor(trajectory.response_ids).long()
        log_probs_TV = torch.log_softmax(logits_1TV[0].double() / self._temperature, -1)
        first = len(trajectory.prompt_ids) - 1
        return log_probs_TV[first:-1].gather(-1, labels_R[:, None])[:, 0].numpy()


def assert_likeliest(results: Sequence[GenerateResult], reference: Reference, tolerance: float) -> None:
    """Check greedy responses: every token is the likeliest one, but for differences of rounding in nats."""
    found = trajectories(results)
    assert max(float(reference.below_best(t).max()) for t in found.values()) <= tolerance
    assert all(t.routes is None for t in found.values()), "an evaluation costs no routes"
