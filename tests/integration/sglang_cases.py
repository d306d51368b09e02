"""Helpers of the SGLang tests: a configuration, and a strategy on its own loop."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rollout_cases import RESPONSE_LENGTH, SMALL_SERVER, Rollout, rollout_config

from roll_r3.config.engine_role import engine_role
from roll_r3.config.pipeline import RLVRConfig
from roll_r3.engines.sglang.strategy import SglangRollout
from roll_r3.strategies.base import EnginePlace


def configuration(
    checkpoint: Path,
    dtype: str,
    *,
    temperature: float = 1.0,
    prompt_length: int = 64,
    response_length: int = RESPONSE_LENGTH,
    **settings: Any,
) -> RLVRConfig:
    return rollout_config(
        checkpoint,
        "sglang",
        {"dtype": dtype, **SMALL_SERVER, **settings},
        generating={"temperature": temperature},
        prompt_length=prompt_length,
        response_length=response_length,
    )


class Engine(Rollout[SglangRollout]):
    def __init__(self, config: RLVRConfig, log_path: Path, engine_index: int = 0) -> None:
        self.log_path = log_path
        super().__init__(SglangRollout(engine_role(config), EnginePlace(engine_index, "cpu", (), log_path)))
