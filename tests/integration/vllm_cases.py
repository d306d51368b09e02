"""What the vLLM tests share: where its environment is, a strategy on a loop of its own, and new weights for it."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Coroutine, Sequence
from pathlib import Path
from typing import Any, TypeVar

import pytest

from roll_r3.config.pipeline import RLVRConfig
from roll_r3.strategies.base import GenerateRequest, GenerateResult
from roll_r3.strategies.rollout.vllm.strategy import VllmRollout

T = TypeVar("T")

RESPONSE_LENGTH = 12
HEAD_DIM = 32
"""The smallest attention head that vLLM's kernel for CPUs takes; the tiny models' own are of 16."""
PYTHON = Path(os.environ.get("VLLM_PYTHON", ".venv-vllm/bin/python")).absolute()


def require_environment() -> None:
    """`make test-vllm` sets VLLM_PYTHON: a missing environment is a failure there, elsewhere a reason to skip."""
    if not PYTHON.exists():
        say = pytest.fail if "VLLM_PYTHON" in os.environ else pytest.skip
        say(f"vLLM's environment is not there ({PYTHON}): run make vllm-env")


def configuration(
    checkpoint: Path,
    dtype: str = "float32",
    *,
    mode: str = "R3",
    generating: dict[str, Any] | None = None,
    response_length: int = RESPONSE_LENGTH,
    **settings: Any,
) -> RLVRConfig:
    return RLVRConfig.model_validate(
        {
            "exp_name": "test",
            "pretrain": str(checkpoint),
            "prompt_length": 192,
            "response_length": response_length,
            "actor_train": {},
            "actor_infer": {
                "router_replay": {"mode": mode},
                "generating_args": generating or {},
                "strategy_args": {
                    "strategy_name": "vllm",
                    "strategy_config": {
                        "python": str(PYTHON),
                        "dtype": dtype,
                        "max_total_tokens": 8192,
                        "max_running_requests": 64,
                        "startup_timeout": 400,
                        **settings,
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
        self.rollout = VllmRollout(
            config=config, engine_index=engine_index, device="cpu", gpu_ids=(), log_path=log_path
        )

    def run(self, work: Coroutine[Any, Any, T], timeout_s: float = 600.0) -> T:
        return self.loop.run_until_complete(asyncio.wait_for(work, timeout_s))

    def generate(self, requests: Sequence[GenerateRequest]) -> list[GenerateResult]:
        return self.run(self.rollout.generate(requests))

    def metric(self, name: str) -> float:
        """The sum of a counter of vLLM's own over its labels."""
        assert self.rollout._client is not None
        text = self.run(self.rollout._client.get("/metrics", 60.0)).decode()
        return sum(float(line.rpartition(" ")[2]) for line in text.splitlines() if line.startswith(name + "{"))

    def close(self) -> None:
        self.run(self.rollout.stop())
        self.loop.close()
