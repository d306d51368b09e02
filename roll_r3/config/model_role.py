"""View of the configuration for the ranks of one model: all that a trainer reads of it, and nothing else."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from roll_r3.config.algorithm import AlgorithmConfig
from roll_r3.config.derived import (
    algorithm_of,
    checkpoint_of,
    infer_batch_size,
    infer_budget,
    model_workers,
    optimizer_steps,
)
from roll_r3.config.findings.report import Origins, has_errors, render
from roll_r3.config.pipeline import RLVRConfig
from roll_r3.config.rules import check_rules
from roll_r3.config.workers import ActorTrainConfig, ReferenceConfig, ReplayMode, TrainingArgs
from roll_r3.errors import ConfigError

Role = Literal["actor_train", "reference"]
"""Sections of the configuration that run a model in training ranks."""


@dataclass(frozen=True)
class Learning:
    """Settings of the policy's optimizer steps."""

    args: TrainingArgs
    algorithm: AlgorithmConfig
    ppo_epochs: int
    max_tokens: int | None
    """Tokens of a micro-batch; None: `args.per_device_train_batch_size` cuts the samples."""
    total_optimizer_steps: int
    """Optimizer steps of the whole run, over which the learning rate decays."""


@dataclass(frozen=True)
class ModelRole:
    """Settings of one role's ranks, the same on each of them."""

    name: Role
    section: ActorTrainConfig | ReferenceConfig
    checkpoint: str
    """Checkpoint directory."""
    seed: int
    temperature: float
    """Sampling temperature, by which logits are divided."""
    fp32_lm_head: bool
    infer_batch_size: int
    """Samples of a micro-batch in passes without gradients, where no budget cuts them."""
    infer_budget: int | None
    """Tokens of a micro-batch in passes without gradients."""
    learning: Learning | None
    """None: the role never learns."""

    @property
    def path(self) -> str:
        """Dotted path of the strategy's settings, for messages."""
        return f"{self.name}.strategy_args.strategy_config"

    @property
    def replay_mode(self) -> ReplayMode:
        """Replay mode of the role; the reference never replays."""
        return self.section.router_replay.mode if isinstance(self.section, ActorTrainConfig) else "disable"


def model_role(config: RLVRConfig, name: Role, *, checkpoint: str | None = None) -> ModelRole:
    """Return the view of `config` for the ranks of one role.

    The rules are checked here too: a test or a benchmark makes a role without the command line.

    Args:
        checkpoint: directory of the checkpoint, where the configuration names none on this disk.

    Raises:
        ConfigError: a role without a section, or an error of the rule table.
    """
    section = model_workers(config).get(name)
    if section is None:
        raise ConfigError(f"{name} is not configured")
    findings = check_rules(config)
    if has_errors(findings):
        here = f"{name}'s configuration"
        raise ConfigError(render(findings, Origins(here, {path: here for f in findings for path, _ in f.found})))
    return ModelRole(
        name=name,
        section=section,
        checkpoint=checkpoint or checkpoint_of(config, name),
        seed=config.seed,
        temperature=config.actor_infer.generating_args.temperature,
        fp32_lm_head=config.fp32_lm_head,
        infer_batch_size=infer_batch_size(config, section),
        infer_budget=infer_budget(config, section),
        learning=_learning(config, section) if isinstance(section, ActorTrainConfig) else None,
    )


def _learning(config: RLVRConfig, section: ActorTrainConfig) -> Learning:
    return Learning(
        args=section.training_args,
        algorithm=algorithm_of(config),
        ppo_epochs=config.ppo_epochs,
        max_tokens=section.max_tokens_per_microbatch_in_train,
        total_optimizer_steps=config.max_steps * optimizer_steps(config, config.samples_per_step),
    )
