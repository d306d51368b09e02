"""What the constructor refuses, before anything is built."""

from __future__ import annotations

import pytest

from roll_r3.config.pipeline import RLVRConfig
from roll_r3.errors import ConfigError
from roll_r3.strategies.base import ProcessInfo

PP2 = {"pipeline_model_parallel_size": 2}
VPP2 = {**PP2, "virtual_pipeline_model_parallel_size": 2}


def _construct(world_size: int, layout: dict, training: dict | None = None, mode: str = "R3") -> None:
    from roll_r3.strategies.train.megatron.strategy import MegatronTrain

    config = RLVRConfig(
        exp_name="checks",
        pretrain="/nowhere",
        max_steps=2,
        rollout_batch_size=4,
        num_return_sequences_in_group=2,
        actor_infer={},
        actor_train={
            "router_replay": {"mode": mode},
            "strategy_args": {"strategy_name": "megatron_train", "strategy_config": layout},
            "training_args": {"gradient_accumulation_steps": 2, **(training or {})},
        },
    )
    MegatronTrain(config, "actor_train", ProcessInfo(world_size=world_size))


def test_a_sound_configuration_builds_nothing() -> None:
    _construct(2, VPP2)  # the checkpoint does not exist, and no process group is made


@pytest.mark.parametrize(
    ("world_size", "layout", "training", "said"),
    [
        (2, VPP2, {"gradient_accumulation_steps": 1}, r"gradient_accumulation_steps is 1.*multiple of\s.*size 2"),
        (1, {"virtual_pipeline_model_parallel_size": 2}, {}, "virtual stages need 2 or more"),
        (2, {"tensor_model_parallel_size": 2, "sequence_parallel": False}, {}, "sequence_parallel is false"),
        (1, {"sequence_parallel": True}, {}, "sequence_parallel is true"),
        (2, {"expert_tensor_parallel_size": 2}, {}, "expert_tensor_parallel_size is 2 with"),
        (1, {"moe_aux_loss_coeff": 0.01}, {}, "moe_aux_loss_coeff is 0.01: only 0"),
        (1, {"moe_router_fusion": True}, {}, "moe_router_fusion is true with router_replay.mode R3"),
        (2, {**PP2, "moe_token_dispatcher_type": "allgather"}, {}, "use alltoall"),
        (1, {}, {"gradient_accumulation_steps": 3}, "8 samples do not divide into optimizer steps of 3"),
        (1, {}, {"warmup_steps": 8}, "warmup_steps is 8, but the run has 8 optimizer steps"),
    ],
)
def test_it_refuses(world_size: int, layout: dict, training: dict, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        _construct(world_size, layout, training)


def test_every_violation_is_said_at_once() -> None:
    with pytest.raises(ConfigError) as refused:
        _construct(1, {"moe_aux_loss_coeff": 0.1, "moe_router_fusion": True}, {"gradient_accumulation_steps": 3})
    assert len(str(refused.value).splitlines()) == 3


def test_a_role_that_is_not_configured_is_refused() -> None:
    from roll_r3.strategies.train.megatron.strategy import MegatronInfer

    config = RLVRConfig(exp_name="checks", pretrain="/nowhere", actor_train={}, actor_infer={})
    with pytest.raises(ConfigError, match="reference is not configured"):
        MegatronInfer(config, "reference", ProcessInfo())
