"""The registry and the YAML models have the same strategies."""

from __future__ import annotations

import ast
from pathlib import Path
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
from roll_r3.tracking.trackers.libraries import LIBRARIES

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


def test_every_strategy_channel_and_tracker_is_compared_with_its_contract():
    """`mypy` does so in a module with imports of every engine, so its source is read."""
    tree = ast.parse((Path(__file__).parents[2] / "types" / "contracts.py").read_text())
    module_of = {
        name.name: node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) for name in node.names
    }
    compared = {
        node.target.id: {f"{module_of[line.id]}:{line.id}" for line in node.value.elts}
        for node in tree.body
        if isinstance(node, ast.AnnAssign)
    }
    rows = STRATEGIES.values()
    kinds = {kind.upper(): {entry.factory for entry in rows if entry.kind == kind} for kind in SECTIONS}
    trackers = {f"roll_r3.tracking.trackers.{library.module}:{library.starter}" for library in LIBRARIES.values()}
    channels = {entry.weight_channel for entry in rows if entry.weight_channel}
    assert compared == {**kinds, "CHANNEL": channels, "TRACKER": trackers}


@pytest.mark.parametrize(
    ("name", "load"),
    [
        ("fsdp2_infer", "load_trainer"),
        ("hf_infer", "load_model"),
        ("fsdp2_train", "load_rollout"),
        ("fsdp2_train", "load_channel"),
    ],
)
def test_a_strategy_is_loaded_as_no_other_kind(name, load):
    with pytest.raises(AssertionError, match=r"Fsdp2|HfRollout"):
        getattr(STRATEGIES[name], load)()
