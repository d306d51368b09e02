"""View of the configuration for the ranks of a model."""

from __future__ import annotations

from typing import Any

import pytest

from roll_r3.config.model_role import model_role
from roll_r3.config.pipeline import RLVRConfig
from roll_r3.errors import ConfigError


def _config(**fields: Any) -> RLVRConfig:
    return RLVRConfig(
        exp_name="view",
        pretrain="/base",
        seed=7,
        max_steps=3,
        ppo_epochs=2,
        rollout_batch_size=4,
        num_return_sequences_in_group=4,
        use_kl_loss=True,
        actor_infer={"generating_args": {"temperature": 0.5}, "router_replay": {"mode": "R3"}, "device_mapping": [2]},
        actor_train={
            "device_mapping": [0, 1],
            "router_replay": {"mode": "R3"},
            "data_args": {"file_name": "bundled:addition_mod10"},
            "training_args": {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2},
        },
        reference={"device_mapping": [0, 1], "infer_batch_size": 5, "model_args": {"model_name_or_path": "/other"}},
        **fields,
    )


def test_the_actors_view() -> None:
    role = model_role(_config(entropy_loss_coef=0.25), "actor_train")
    assert (role.checkpoint, role.seed, role.temperature, role.replay_mode) == ("/base", 7, 0.5, "R3")
    assert (role.infer_batch_size, role.infer_budget) == (2, None)
    assert role.path == "actor_train.strategy_args.strategy_config"
    learning = role.learning
    assert learning is not None
    assert learning.algorithm.entropy_loss_coef == 0.25
    # 3 steps, 2 epochs, 16 samples in mini-batches of 2 x 2 x 2 ranks
    assert (learning.ppo_epochs, learning.total_optimizer_steps) == (2, 12)


def test_the_references_view_neither_learns_nor_replays() -> None:
    role = model_role(_config(), "reference", checkpoint="/on/this/disk")
    assert (role.learning, role.replay_mode) == (None, "disable")
    assert (role.checkpoint, role.infer_batch_size) == ("/on/this/disk", 5)
    assert model_role(_config(), "reference").checkpoint == "/other"


def test_a_role_without_a_section_is_refused() -> None:
    config = _config().model_copy(update={"reference": None})
    with pytest.raises(ConfigError, match="reference is not configured"):
        model_role(config, "reference")


def test_errors_of_the_rule_table_are_refused_without_the_command_line() -> None:
    config = _config()
    training = config.actor_train.training_args.model_copy(update={"gradient_accumulation_steps": 3})
    config = config.model_copy(
        update={"actor_train": config.actor_train.model_copy(update={"training_args": training})}
    )
    with pytest.raises(ConfigError, match=r"actor_train\.training_args\.gradient_accumulation_steps = 3"):
        model_role(config, "actor_train")
