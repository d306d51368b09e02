"""Rules about the fields of a config.json: the model is built as written, or not at all."""

from __future__ import annotations

from roll_r3.config.derived import checkpoint_of, workers
from roll_r3.config.pipeline import RLVRConfig
from roll_r3.config.rules.table import Verdict
from roll_r3.models.architectures import ARCHITECTURES
from roll_r3.models.architectures.base import Architecture, unbuildable, unknown_fields
from roll_r3.models.architectures.hf_fields import Builder
from roll_r3.preflight.model_files import Model
from roll_r3.preflight.rules.surroundings_rule import CHECKPOINTS, Pretend, SurroundingsRule, strategy_names
from roll_r3.preflight.surroundings import Surroundings
from roll_r3.strategies.registry import STRATEGIES


def _builders(config: RLVRConfig) -> dict[str, Builder]:
    """Return role -> library of its model."""
    return {role: STRATEGIES[name].builder for role, name in strategy_names(config).items()}


def _by_checkpoint(config: RLVRConfig, surroundings: Surroundings) -> dict[str, tuple[list[str], Model, Architecture]]:
    """Return checkpoint -> its roles, model and architecture, for known architectures."""
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
        fields=CHECKPOINTS,
        depends=("actor_infer.strategy_args.strategy_name", "*.strategy_args.strategy_name"),
        why="the libraries would not build the model as these settings of its config.json say",
        fix="use a checkpoint without them, or strategies that support them",
        wrong=(),
        wrong_where=Pretend(config_json={"hidden_act": "gelu"}),
        right=(),
        right_where=Pretend(config_json={"hidden_act": "silu"}),
        violates=_unbuildable,
    ),
    SurroundingsRule(
        id="config-fields-known",
        fields=CHECKPOINTS,
        why="roll_r3 does not know these fields of config.json: if one of them changes the model's computation, "
        "rollout and trainer may disagree",
        fix="watch actor/rollout_train_logprobs_abs_diff_mean in the first step, or remove fields without effect",
        wrong=(),
        wrong_where=Pretend(config_json={"residual_scale": 0.5}),
        right=(),
        right_where=Pretend(config_json={"initializer_range": 0.5}),
        violates=_unknown_fields,
        severity="warning",
    ),
)
