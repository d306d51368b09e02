"""Errors of the constructor, before anything is built."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from roll_r3.config.model_role import model_role
from roll_r3.config.pipeline import RLVRConfig
from roll_r3.config.strategies import MegatronConfig
from roll_r3.config.workers import ModelArgs, RouterReplayConfig
from roll_r3.errors import ConfigError
from roll_r3.strategies.base import ProcessInfo
from roll_r3.trainers.megatron.parallel import RankLayout

VPP2 = {"pipeline_model_parallel_size": 2, "virtual_pipeline_model_parallel_size": 2}


def _config(devices: int, layout: dict[str, Any] | None = None, **training: Any) -> RLVRConfig:
    return RLVRConfig(
        exp_name="checks",
        pretrain="/nowhere",
        max_steps=2,
        rollout_batch_size=4,
        num_return_sequences_in_group=2,
        # a warning: it does not stop a run
        actor_infer={"router_replay": {"mode": "R3"}, "generating_args": {"top_k": 50}},
        actor_train={
            "router_replay": {"mode": "R3"},
            "device_mapping": list(range(devices)),
            "data_args": {"file_name": "bundled:addition_mod10"},
            "strategy_args": {"strategy_name": "megatron_train", "strategy_config": layout or {}},
            "training_args": {"gradient_accumulation_steps": 2, **training},
        },
    )


def _construct(config: RLVRConfig, world_size: int) -> None:
    from roll_r3.trainers.megatron.strategy import MegatronTrain

    MegatronTrain(model_role(config, "actor_train"), ProcessInfo(world_size=world_size))


def test_a_sound_configuration_builds_nothing() -> None:
    _construct(_config(2, VPP2), 2)  # the checkpoint does not exist, and no process group is made


def test_what_the_rule_table_refuses_is_refused_here_too_and_all_of_it_is_said() -> None:
    config = _config(2, {**VPP2, "moe_router_fusion": True}, gradient_accumulation_steps=1)
    with pytest.raises(ConfigError) as refused:
        _construct(config, 2)
    text = str(refused.value)
    assert "error [fused-router-skips-replay]" in text
    assert "error [interleaved-micro-batches]" in text
    assert "actor_train.training_args.gradient_accumulation_steps = 1  (actor_train's configuration)" in text


@pytest.mark.parametrize("granularity", [None, "full", "selective"])
def test_megatron_gets_the_recompute_settings_that_are_read(granularity: str | None) -> None:
    """Megatron refuses some of the others; here they are only a warning."""
    from roll_r3.trainers.megatron.model import _overrides
    from roll_r3.trainers.megatron.parallel import RankLayout

    settings = MegatronConfig(
        recompute_granularity=granularity,
        recompute_method="block",
        recompute_num_layers=2,
        recompute_modules=("moe",),
    )
    layout = RankLayout.of(settings, ProcessInfo(world_size=1), "here")
    fields = _overrides(settings, layout, grouped=False, replays=True, transformer_engine=False)
    assert fields["recompute_granularity"] == granularity
    full = (fields["recompute_method"], fields["recompute_num_layers"])
    assert full == (("block", 2) if granularity == "full" else (None, None))
    assert fields["recompute_modules"] == (["moe"] if granularity == "selective" else None)


@pytest.mark.parametrize(("module", "needs"), [("layernorm", "TransformerEngine"), ("moe_act", "moe_grouped_gemm")])
def test_modules_that_plain_layers_cannot_recompute_are_refused_before_the_first_step(module: str, needs: str) -> None:
    """The case is a GPU without TransformerEngine, unknown to every rule."""
    from roll_r3.trainers.megatron.model import build_model

    settings = MegatronConfig(recompute_granularity="selective", recompute_modules=(module,))
    layout, device = RankLayout.of(settings, ProcessInfo(), "settings"), torch.device("cpu")
    with pytest.raises(ConfigError, match=f"recompute_modules has {module}, which needs {needs}"):
        build_model("/nowhere", ModelArgs(), settings, layout, device, replays=True, trains=True)


@pytest.mark.parametrize(("mode", "audited"), [("R3", True), ("R2", True), ("disable", False)])
def test_without_replay_there_is_nothing_to_audit(mode: Any, audited: bool) -> None:
    from roll_r3.replay.audit import is_audited

    settings = RouterReplayConfig(mode=mode, audit=True, audit_every=5)
    assert [is_audited(settings, step) for step in (1, 2, 6)] == [audited, False, audited]
