"""View of the configuration for one rollout engine: all that an engine reads of it, and nothing else."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from roll_r3.config.derived import checkpoint_of, engine_room, sampling
from roll_r3.config.pipeline import RLVRConfig
from roll_r3.config.sampling_settings import Sampling
from roll_r3.config.strategies import HfInferConfig, SglangConfig, VllmConfig


@dataclass(frozen=True)
class EngineRole:
    """Settings of one engine of `actor_infer`."""

    settings: SglangConfig | VllmConfig | HfInferConfig
    """Settings of the strategy, timeouts included."""
    checkpoint: str
    """Checkpoint directory, or the name of one."""
    trust_remote_code: bool
    sampling: Sampling
    """Settings of training's samples, for the warm-up and the launch. A request brings its own."""
    prompt_length: int
    """Longest prompt, in tokens."""
    context_length: int
    """Context with room for the longest prompt and response, in tokens."""
    record_routes: bool
    fp32_lm_head: bool
    seed: int
    """Seed of the run; each engine adds its number."""
    environment: Mapping[str, str] = field(default_factory=dict)
    """Environment variables of the server, in addition to those of its worker."""


def engine_role(config: RLVRConfig) -> EngineRole:
    """Return the view of `config` for the engines of `actor_infer`."""
    role = config.actor_infer
    return EngineRole(
        settings=role.strategy_args.strategy_config,
        checkpoint=checkpoint_of(config, "actor_infer"),
        trust_remote_code=role.model_args.trust_remote_code,
        sampling=sampling(config),
        prompt_length=config.prompt_length,
        context_length=engine_room(config),
        record_routes=role.router_replay.mode == "R3",
        fp32_lm_head=config.fp32_lm_head,
        seed=config.seed,
        environment=config.system_envs,
    )
