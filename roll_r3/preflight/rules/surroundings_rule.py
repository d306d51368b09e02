"""Rows of the rule table about more than the YAML: the form of a rule, and the surroundings of its examples."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from roll_r3.config.derived import MegatronWorker, checkpoint_of, megatron_workers, model_workers, values_at
from roll_r3.config.findings.report import Finding
from roll_r3.config.pipeline import RLVRConfig
from roll_r3.config.rules.table import Row, Verdict
from roll_r3.engines.vllm.version import TESTED
from roll_r3.models.architectures.base import RawConfig
from roll_r3.models.facts import ModelFacts
from roll_r3.preflight.model_files import Model
from roll_r3.preflight.surroundings import Surroundings
from roll_r3.strategies.base import Capabilities

CHECKPOINTS = ("pretrain", "*.model_args.model_name_or_path")
"""Fields that name a checkpoint."""


@dataclass(frozen=True)
class Pretend:
    """Differences between the surroundings of an example and this machine."""

    capabilities: Mapping[str, Capabilities] = field(default_factory=dict)
    """Strategy -> declared capabilities."""
    versions: Mapping[str, str | None] = field(default_factory=dict)
    """Package -> installed release; None: not installed."""
    config_json: Mapping[str, Any] = field(default_factory=dict)
    """Fields of the checkpoints' config.json -> their values."""
    domain_problems: tuple[str, ...] = ()
    """Files, and their domains without a reward rule."""
    missing_trackers: tuple[str, ...] = ()
    """Trackers without their library."""

    def change(self, surroundings: Surroundings) -> Surroundings:
        """Return `surroundings` with these differences."""
        strategies = dict(surroundings.strategies)
        for name, capabilities in self.capabilities.items():
            strategies[name] = replace(strategies[name], capabilities=capabilities)
        versions = dict(surroundings.versions) | dict(self.versions)
        models = {
            name: Model.of(dict(model.raw) | dict(self.config_json), model.source)
            for name, model in surroundings.models.items()
        }
        problems = self.domain_problems or surroundings.domain_problems
        return replace(
            surroundings,
            strategies=strategies,
            versions=versions,
            models=models,
            domain_problems=problems,
            missing_trackers=self.missing_trackers or surroundings.missing_trackers,
        )


VLLM_INSTALLED = Pretend(versions={"vllm": f"{TESTED}+cpu"})
"""The environment of `make vllm-env`."""


@dataclass(frozen=True, kw_only=True)
class SurroundingsRule(Row):
    """Row about the configuration and the machine that would run it."""

    violates: Callable[[RLVRConfig, Surroundings], Verdict]
    wrong_where: Pretend = Pretend()
    right_where: Pretend = Pretend()

    def check(self, config: RLVRConfig, surroundings: Surroundings) -> Iterator[Finding]:
        """Yield one finding if the rule is violated."""
        if verdict := self.violates(config, surroundings):
            yield self.finding(config, verdict)


@dataclass(frozen=True)
class RoleModel:
    """Role of a Megatron strategy, and its model."""

    config: RLVRConfig
    role: str
    worker: MegatronWorker
    name: str
    """Checkpoint as written in the configuration."""
    facts: ModelFacts
    raw: RawConfig
    """Its config.json."""


@dataclass(frozen=True, kw_only=True)
class ModelRule(Row):
    """Row about each Megatron role with a known model. `fields` are relative to the role."""

    violates: Callable[[RoleModel], Verdict]

    def check(self, config: RLVRConfig, surroundings: Surroundings) -> Iterator[Finding]:
        """Yield one finding for each violating role."""
        for role, worker in megatron_workers(config).items():
            name = checkpoint_of(config, role)
            model = surroundings.models.get(name)
            if model is None or model.facts is None:
                continue
            if verdict := self.violates(RoleModel(config, role, worker, name, model.facts, model.raw)):
                found = self.finding(config, verdict, role)
                yield replace(found, found=(*found.found, *_checkpoint_fields(config, role)))


def _checkpoint_fields(config: RLVRConfig, role: str) -> list[tuple[str, object]]:
    """Return the field with the checkpoint of a role, and its value."""
    own = values_at(config, f"{role}.model_args.model_name_or_path")
    return own if own[0][1] is not None else values_at(config, "pretrain")


def strategy_names(config: RLVRConfig) -> dict[str, str]:
    """Return role -> strategy_name."""
    names: dict[str, str] = {"actor_infer": config.actor_infer.strategy_args.strategy_name}
    return names | {role: worker.strategy_args.strategy_name for role, worker in model_workers(config).items()}


AnyPreflightRule = SurroundingsRule | ModelRule
