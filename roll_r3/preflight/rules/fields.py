"""Rules on the fields of a config.json: the model is built as they say, or not at all."""

from __future__ import annotations

from roll_r3.config.derived import checkpoint_of, model_workers, workers
from roll_r3.config.pipeline import RLVRConfig
from roll_r3.config.rules.table import Verdict
from roll_r3.models.architectures import ARCHITECTURES
from roll_r3.models.architectures.base import Architecture, unbuildable, unknown_fields
from roll_r3.models.architectures.fields import Builder
from roll_r3.preflight.checkpoints import Model
from roll_r3.preflight.rules.table import Pretend, SurroundingsRule
from roll_r3.preflight.surroundings import Surroundings
from roll_r3.strategies.registry import STRATEGIES

_CHECKPOINTS = ("pretrain", "*.model_args.model_name_or_path")


def _builders(config: RLVRConfig) -> dict[str, Builder]:
    """Role -> the library that builds its model."""
    names: dict[str, str] = {"actor_infer": config.actor_infer.strategy_args.strategy_name}
    names |= {role: worker.strategy_args.strategy_name for role, worker in model_workers(config).items()}
    return {role: STRATEGIES[name].builder for role, name in names.items()}


def _by_checkpoint(config: RLVRConfig, surroundings: Surroundings) -> dict[str, tuple[list[str], Model, Architecture]]:
    """Checkpoint -> its roles, and what is known of it; only those of a known architecture."""
    found: dict[str, tuple[list[str], Model, Architecture]] = {}
    for role in workers(config):
        name = checkpoint_of(config, role)
        model = surroundings.models.get(name)
        if model is not None and model.facts:
            found.setdefault(name, ([], model, ARCHITECTURES[model.facts.model_type]))[0].append(role)
    return found


def _unbuildable(config: RLVRConfig, surroundings: Surroundings) -> Verdict:
    builders, found = _builders(config), []
    for roles, model, architecture in _by_checkpoint(config, surroundings).values():
        if reasons := unbuildable(architecture, model.raw, {builders[role] for role in roles}):
            found.append(f"{', '.join(roles)}: {'; '.join(reasons)}")
    return "; ".join(found)


def _unknown_fields(config: RLVRConfig, surroundings: Surroundings) -> Verdict:
    found = []
    for roles, model, architecture in _by_checkpoint(config, surroundings).values():
        if fields := unknown_fields(architecture, model.raw):
            found.append(f"{', '.join(roles)}: {', '.join(fields)}")
    return "; ".join(found)


RULES: tuple[SurroundingsRule, ...] = (
    SurroundingsRule(
        id="checkpoint-buildable",
        fields=_CHECKPOINTS,
        depends=("actor_infer.strategy_args.strategy_name", "*.strategy_args.strategy_name"),
        why="the model would be built otherwise than these settings in its config.json say",
        fix="name a checkpoint without them, or strategies that build them",
        wrong=(),
        wrong_where=Pretend(config_json={"hidden_act": "gelu"}),
        right=(),
        right_where=Pretend(config_json={"hidden_act": "silu"}),
        violates=_unbuildable,
    ),
    SurroundingsRule(
        id="config-fields-known",
        fields=_CHECKPOINTS,
        why="roll_r3 does not know these fields of its config.json: if one changes what the model computes, rollout "
        "and trainer may compute different models",
        fix="watch actor/rollout_train_logprobs_abs_diff_mean in the first step, or take out fields without effect",
        wrong=(),
        wrong_where=Pretend(config_json={"residual_scale": 0.5}),
        right=(),
        right_where=Pretend(config_json={"initializer_range": 0.5}),
        violates=_unknown_fields,
        severity="warning",
    ),
)
