"""The registry and the YAML models speak of the same strategies."""

from __future__ import annotations

from typing import get_args

import pytest

from roll_r3.config.workers import (
    ActorInferConfig,
    ActorTrainConfig,
    Fsdp2InferStrategy,
    Fsdp2TrainStrategy,
    HfInferStrategy,
    MegatronInferStrategy,
    MegatronTrainStrategy,
    ReferenceConfig,
    SglangStrategy,
    VllmStrategy,
)
from roll_r3.strategies.registry import STRATEGIES

SECTIONS = {
    "rollout": (ActorInferConfig, (SglangStrategy, VllmStrategy, HfInferStrategy)),
    "train": (ActorTrainConfig, (MegatronTrainStrategy, Fsdp2TrainStrategy)),
    "infer": (ReferenceConfig, (MegatronInferStrategy, Fsdp2InferStrategy)),
}


def name_of(section: type) -> str:
    (name,) = get_args(section.model_fields["strategy_name"].annotation)
    return name


@pytest.mark.parametrize("kind", SECTIONS)
def test_a_role_takes_the_strategies_of_its_kind(kind):
    role, sections = SECTIONS[kind]
    assert {name_of(section) for section in sections} == {n for n, entry in STRATEGIES.items() if entry.kind == kind}
    for section in sections:
        args = role(strategy_args={"strategy_name": name_of(section)}).strategy_args
        assert type(args) is section
        assert section.model_fields["strategy_config"].annotation is STRATEGIES[name_of(section)].config


@pytest.mark.parametrize("kind", SECTIONS)
def test_a_role_without_a_name_runs_the_first_of_them(kind):
    role, (first, *_) = SECTIONS[kind]
    assert type(role().strategy_args) is type(role(strategy_args={}).strategy_args) is first
