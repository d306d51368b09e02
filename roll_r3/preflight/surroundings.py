"""What a check may know beyond the YAML: models, files, reward functions, installed engines. Read once, then data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from roll_r3.config.derived import changed, checkpoint_of, saving_dir, sglang, vllm, workers
from roll_r3.config.pipeline import RLVRConfig
from roll_r3.config.rules.paths import ENGINE
from roll_r3.preflight import files
from roll_r3.preflight.checkpoints import Model, find_model, incomplete
from roll_r3.preflight.domains import domains_without_rule
from roll_r3.preflight.versions import find_interpreter, find_versions
from roll_r3.strategies.registry import STRATEGIES, StrategyEntry


@dataclass(frozen=True)
class Surroundings:
    """Facts about where a configuration would run."""

    strategies: Mapping[str, StrategyEntry] = field(default_factory=lambda: STRATEGIES)
    models: Mapping[str, Model] = field(default_factory=dict)
    """Checkpoint -> what its config.json says; a checkpoint that nobody knows here is not in it."""
    checkpoint_problems: Mapping[str, str] = field(default_factory=dict)
    """Checkpoint -> why it cannot be loaded from here."""
    data_problems: tuple[str, ...] = ()
    domain_problems: tuple[str, ...] = ()
    """Domains without a reward rule, for each file of prompts."""
    reward_problems: tuple[str, ...] = ()
    output_problem: str = ""
    saving_problem: str = ""
    """Why checkpoints cannot be written where the configuration says."""
    resume_problem: str = ""
    """Why the checkpoint that the configuration names cannot be gone on from."""
    engine_python_missing: bool = False
    """The interpreter that the configuration names for the engine is not on this machine."""
    versions: Mapping[str, str | None] = field(default_factory=dict)
    """Package of an engine -> its installed version, None: not installed. Of a package that is not in it nothing is
    known."""

    def unknown_models(self, config: RLVRConfig) -> list[str]:
        """Checkpoints of a configuration of which nothing is known here, and which may be elsewhere."""
        return [n for n in _checkpoints(config) if n not in self.models and n not in self.checkpoint_problems]


def look_around(config: RLVRConfig) -> Surroundings:
    """Read what this machine says about a configuration that is to run on it."""
    names = _checkpoints(config)
    server = sglang(config) or vllm(config)
    # Where the interpreter was not named, it is the engine that is missing.
    python = server.python if server is not None and changed(config, f"{ENGINE}.python") else None
    problems = {name: found for name in names if isinstance(found := find_model(name), str) and found}
    lacking = {name: lack for name in names if name not in problems and (lack := incomplete(name))}
    return replace(
        elsewhere(config),
        checkpoint_problems=problems | lacking,
        data_problems=tuple(files.data_problems(config.actor_train.data_args)),
        domain_problems=tuple(domains_without_rule(config.actor_train.data_args, config.rewards)),
        reward_problems=tuple(files.reward_problems(config.rewards)),
        output_problem=files.output_problem(config.output_dir, config.exp_name),
        saving_problem=files.output_problem(saving_dir(config), config.exp_name),
        resume_problem=files.resume_problem(config.resume_from_checkpoint),
        engine_python_missing=python is not None and find_interpreter(python) is None,
        versions=find_versions(config),
    )


def elsewhere(config: RLVRConfig) -> Surroundings:
    """What is known here of a configuration that is to run on another machine: what its models are like."""
    models = {name: find_model(name) for name in _checkpoints(config)}
    return Surroundings(models={name: model for name, model in models.items() if isinstance(model, Model)})


def _checkpoints(config: RLVRConfig) -> list[str]:
    return sorted({checkpoint_of(config, role) for role in workers(config)})
