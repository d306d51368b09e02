"""Facts for checks beyond the YAML: models, files, reward functions, installed engines. Read once, then plain data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from roll_r3.config.derived import changed, checkpoint_of, saving_dir, sglang, vllm, workers
from roll_r3.config.pipeline import RLVRConfig
from roll_r3.config.rules.paths import ENGINE
from roll_r3.config.workers import DataArgs
from roll_r3.preflight import files
from roll_r3.preflight.domains import domains_without_rule
from roll_r3.preflight.model_files import Model, find_model, incomplete
from roll_r3.preflight.reward_functions import missing_keys, reward_problems
from roll_r3.preflight.versions import find_interpreter, find_versions, release
from roll_r3.strategies.registry import STRATEGIES, StrategyEntry
from roll_r3.tracking.trackers.libraries import LIBRARIES


@dataclass(frozen=True)
class Surroundings:
    """Facts about the machine that would run a configuration."""

    strategies: Mapping[str, StrategyEntry] = field(default_factory=lambda: STRATEGIES)
    models: Mapping[str, Model] = field(default_factory=dict)
    """Checkpoint -> its config.json; checkpoints unknown on this machine are left out."""
    checkpoint_problems: Mapping[str, str] = field(default_factory=dict)
    """Checkpoint -> reason that it cannot be loaded on this machine."""
    data_problems: tuple[str, ...] = ()
    domain_problems: tuple[str, ...] = ()
    """Domains without a reward rule, one text per prompt file."""
    evaluation_problems: tuple[str, ...] = ()
    """Problems of the evaluation's prompts, domains without a reward rule included."""
    missing_trackers: tuple[str, ...] = ()
    """Trackers in `track_with` without their library on this machine."""
    reward_problems: tuple[str, ...] = ()
    missing_keys: tuple[str, ...] = ()
    """Environment variables of judges' keys, not set."""
    output_problem: str = ""
    saving_problem: str = ""
    """Reason that checkpoints cannot be written to the configured directory."""
    resume_problem: str = ""
    """Reason that the run cannot resume from the configured checkpoint."""
    engine_python_missing: bool = False
    """True if the configured interpreter of the engine is not on this machine."""
    versions: Mapping[str, str | None] = field(default_factory=dict)
    """Package of an engine -> installed version; None: not installed. Packages of unknown state are left out."""

    def unknown_models(self, config: RLVRConfig) -> list[str]:
        """Return checkpoints that are unknown on this machine and may be on another one."""
        return [n for n in _checkpoints(config) if n not in self.models and n not in self.checkpoint_problems]


def read_surroundings(config: RLVRConfig) -> Surroundings:
    """Read the facts of this machine for a configuration."""
    names = _checkpoints(config)
    server = sglang(config) or vllm(config)
    # For a default interpreter the missing engine is reported instead.
    python = server.python if server is not None and changed(config, f"{ENGINE}.python") else None
    problems = {name: found for name in names if isinstance(found := find_model(name), str) and found}
    lacking = {name: lack for name in names if name not in problems and (lack := incomplete(name))}
    return replace(
        elsewhere(config),
        checkpoint_problems=problems | lacking,
        data_problems=tuple(files.data_problems(config.actor_train.data_args)),
        domain_problems=tuple(domains_without_rule(config.actor_train.data_args, config.rewards)),
        evaluation_problems=()
        if config.validation is None
        else _evaluation_problems(config, config.validation.data_args),
        missing_trackers=tuple(
            name for name in dict.fromkeys(config.track_with) if release(LIBRARIES[name].package) is None
        ),
        reward_problems=tuple(reward_problems(config.rewards)),
        missing_keys=tuple(missing_keys(config.rewards, config.system_envs)),
        output_problem=files.output_problem(config.output_dir, config.exp_name),
        saving_problem=files.output_problem(saving_dir(config), config.exp_name),
        resume_problem=files.resume_problem(config.resume_from_checkpoint),
        engine_python_missing=python is not None and find_interpreter(python) is None,
        versions=find_versions(config),
    )


def _evaluation_problems(config: RLVRConfig, args: DataArgs) -> tuple[str, ...]:
    return (*files.data_problems(args), *domains_without_rule(args, config.rewards))


def elsewhere(config: RLVRConfig) -> Surroundings:
    """Return the facts for a run on another machine: models only."""
    models = {name: find_model(name) for name in _checkpoints(config)}
    return Surroundings(models={name: model for name, model in models.items() if isinstance(model, Model)})


def _checkpoints(config: RLVRConfig) -> list[str]:
    return sorted({checkpoint_of(config, role) for role in workers(config)})
