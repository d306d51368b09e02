"""What the SGLang tests share: a configuration, a strategy on a loop of its own, and transformers as the reference."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Coroutine, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import psutil
import torch
from transformers import AutoModelForCausalLM

from roll_r3.batch.trajectory import Trajectory
from roll_r3.config.pipeline import RLVRConfig
from roll_r3.strategies.base import GenerateRequest, GenerateResult
from roll_r3.strategies.rollout.process import ServerProcess
from roll_r3.strategies.rollout.sglang.strategy import SglangRollout

T = TypeVar("T")

RESPONSE_LENGTH = 12


def configuration(
    checkpoint: Path,
    dtype: str,
    *,
    temperature: float = 1.0,
    response_length: int = RESPONSE_LENGTH,
    **strategy_config: Any,
) -> RLVRConfig:
    return RLVRConfig.model_validate(
        {
            "exp_name": "test",
            "pretrain": str(checkpoint),
            "prompt_length": 64,
            "response_length": response_length,
            "actor_train": {},
            "actor_infer": {
                "router_replay": {"mode": "R3"},
                "generating_args": {"temperature": temperature},
                "strategy_args": {
                    "strategy_name": "sglang",
                    "strategy_config": {
                        "dtype": dtype,
                        "max_total_tokens": 8192,
                        "max_running_requests": 64,
                        "startup_timeout": 400,
                        **strategy_config,
                    },
                },
            },
        }
    )


class Engine:
    """A strategy and the event loop that it lives in."""

    def __init__(self, config: RLVRConfig, log_path: Path, engine_index: int = 0) -> None:
        self.log_path = log_path
        self.loop = asyncio.new_event_loop()
        self.rollout = SglangRollout(
            config=config, engine_index=engine_index, device="cpu", gpu_ids=(), log_path=log_path
        )

    def run(self, work: Coroutine[Any, Any, T], timeout_s: float = 900.0) -> T:
        return self.loop.run_until_complete(asyncio.wait_for(work, timeout_s))

    def generate(self, requests: Sequence[GenerateRequest]) -> list[GenerateResult]:
        return self.run(self.rollout.generate(requests))

    def close(self) -> None:
        self.run(self.rollout.stop())
        self.loop.close()


def group_members(server: ServerProcess) -> list[psutil.Process]:
    """Live processes of the server's group; a zombie is dead and only waits for its parent."""
    found = []
    for process in psutil.process_iter():
        try:
            if os.getpgid(process.pid) == server.pid and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except (ProcessLookupError, psutil.NoSuchProcess):
            continue
    return found


def requests(num_prompts: int, samples: int, *, first_seed: int = 100) -> list[GenerateRequest]:
    """Prompts of different lengths over the byte vocabulary; every sample has a seed of its own."""
    draw = np.random.default_rng(0)
    made = []
    for prompt in range(num_prompts):
        ids = tuple(int(token) for token in draw.integers(0, 256, size=3 + prompt % 7))
        seeds = tuple(first_seed + prompt * samples + sample for sample in range(samples))
        made.append(GenerateRequest(ids, tuple(f"p{prompt}/s{sample}" for sample in range(samples)), seeds))
    return made


def trajectories(results: Sequence[GenerateResult]) -> dict[str, Trajectory]:
    assert all(not result.dropped for result in results), [result.dropped for result in results]
    return {t.sample_id: t for result in results for t in result.trajectories}


class Reference:
    """One transformers forward in fp32 over a whole sequence: no cache, no batching, no code of ours."""

    def __init__(self, checkpoint: Path, temperature: float = 1.0) -> None:
        self._model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).eval()
        self._temperature = temperature

    def log_probs(self, trajectory: Trajectory) -> np.ndarray:
        """Of the response tokens. [R]"""
        return self._of_response(trajectory, self._forward(trajectory).logits)

    def log_probs_and_routes(self, trajectory: Trajectory) -> tuple[np.ndarray, np.ndarray]:
        """([R] of the response tokens, top-k ids [layers, T - 1, k] in the router's order)."""
        output = self._forward(trajectory, output_router_logits=True)
        top_k = self._model.config.num_experts_per_tok
        routes = torch.stack([torch.topk(logits, top_k, -1).indices for logits in output.router_logits])
        return self._of_response(trajectory, output.logits), routes[:, :-1].numpy()

    @torch.no_grad()
    def _forward(self, trajectory: Trajectory, **options: Any) -> Any:
        ids = torch.tensor(np.concatenate([trajectory.prompt_ids_P, trajectory.response_ids_R])).long()
        return self._model(ids[None], **options)

    def _of_response(self, trajectory: Trajectory, logits_1TV: torch.Tensor) -> np.ndarray:
        labels_R = torch.tensor(trajectory.response_ids_R).long()
        log_probs_TV = torch.log_softmax(logits_1TV[0].double() / self._temperature, -1)
        first = len(trajectory.prompt_ids_P) - 1
        return log_probs_TV[first:-1].gather(-1, labels_R[:, None])[:, 0].numpy()
