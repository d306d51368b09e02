"""Helpers of the vLLM tests: its environment, and a strategy on its own loop."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
from rollout_cases import RESPONSE_LENGTH, SMALL_SERVER, Rollout, rollout_config

from roll_r3.config.engine_role import engine_role
from roll_r3.config.pipeline import RLVRConfig
from roll_r3.engines.vllm.strategy import VllmRollout
from roll_r3.strategies.base import EnginePlace

HEAD_DIM = 32
"""Smallest attention head of vLLM's CPU kernel; the tiny models' default is 16."""
PYTHON = Path(os.environ.get("VLLM_PYTHON", ".venv-vllm/bin/python")).absolute()


def require_environment() -> None:
    """Without the environment, fail if VLLM_PYTHON is set (by `make test-vllm`), else skip."""
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
    return rollout_config(
        checkpoint,
        "vllm",
        {"python": str(PYTHON), "dtype": dtype, **SMALL_SERVER, **settings},
        mode=mode,
        generating=generating,
        prompt_length=192,
        response_length=response_length,
    )


class Engine(Rollout[VllmRollout]):
    def __init__(self, config: RLVRConfig, log_path: Path, engine_index: int = 0) -> None:
        self.log_path = log_path
        super().__init__(VllmRollout(engine_role(config), EnginePlace(engine_index, "cpu", (), log_path)))

    def metric(self, name: str) -> float:
        """Return the sum of one of vLLM's counters over its labels."""
        assert self.rollout._client is not None
        text = self.run(self.rollout._client.get("/metrics", 60.0)).decode()
        return sum(float(line.rpartition(" ")[2]) for line in text.splitlines() if line.startswith(name + "{"))
