"""Planned contents of a rank, against megatron's real models in four processes."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from distributed import Gang
from megatron_cases import Case, make_batch, shard

from roll_r3.batch.batch import Batch
from roll_r3.config.model_role import model_role
from roll_r3.config.pipeline import RLVRConfig
from roll_r3.platform import megatron_cpu
from roll_r3.preflight.plan.make import make_plan
from roll_r3.strategies.base import ProcessInfo, TrainStrategy

pytestmark = pytest.mark.integration
Gangs = Callable[[int], Gang]

TP2 = {"tensor_model_parallel_size": 2}
PP2 = {"pipeline_model_parallel_size": 2}
CP2 = {"context_parallel_size": 2}
EP2 = {"expert_model_parallel_size": 2}
NODE_SIZES = (1, 2)
SHARDED = {"use_distributed_optimizer": True}

LAYOUTS: dict[str, tuple[str, dict[str, Any], str]] = {
    "TP2 EP2 DP2, sharded, bf16": ("qwen3_moe", {**TP2, **EP2, **SHARDED}, "bf16"),
    "TP4, two key-value heads": ("qwen3_moe", {"tensor_model_parallel_size": 4}, "fp32"),
    "PP2 VPP2 DP2, bf16": ("qwen3_moe", {**PP2, "virtual_pipeline_model_parallel_size": 2}, "bf16"),
    "PP4 VPP1 layout": (
        "qwen3_moe",
        {"pipeline_model_parallel_size": 4, "pipeline_model_parallel_layout": "E|tt|t|tL"},
        "fp32",
    ),
    "PP2 uneven, CP2, a dense layer": (
        "qwen3_moe_mixed",
        {**PP2, **CP2, "num_layers_in_first_pipeline_stage": 1, "num_layers_in_last_pipeline_stage": 3},
        "fp32",
    ),
    "EP2 ETP2, sharded": ("qwen2_moe", {**TP2, **EP2, "expert_tensor_parallel_size": 2, **SHARDED}, "bf16"),
    "TP2 CP2 EP4": ("olmoe", {**TP2, **CP2, "expert_model_parallel_size": 4}, "fp32"),
    "EP4, sharded": ("mixtral", {"expert_model_parallel_size": 4, **SHARDED}, "fp32"),
    "TP2 PP2 of latent attention": ("deepseek_v3", {**TP2, **PP2}, "bf16"),
    "TP2 EP2 of latent attention": ("moonlight", {**TP2, **EP2}, "fp32"),
}


@dataclass
class Measured:
    """Actual contents of one rank."""

    place: tuple[int, ...]
    """(tp, cp, dp, pp, etp, ep, edp) from megatron's groups."""
    layers: list[tuple[int, ...]]
    moe_layers: list[tuple[int, ...]]
    parameters: list[int]
    """Number of parameters of each chunk."""
    expert_parameters: list[int]
    weights: int
    """Bytes of the weights."""
    gradients: int
    optimizer: int
    most_under_way: int
    """Maximum number of forward passes still waiting for their backward."""
    gathered: Counter[tuple[int, int]]
    """(devices of a node, node) -> bytes sent into it by this rank in the export of weights."""


def measure(process: ProcessInfo, config: RLVRConfig, batch: Batch) -> Measured:
    """Build the strategy, run a training step, measure the result."""
    import torch

    megatron_cpu.install()
    from megatron.core import parallel_state as mpu

    from roll_r3.trainers.megatron.bridge import unwrap
    from roll_r3.trainers.megatron.strategy import MegatronTrain

    strategy = MegatronTrain(model_role(config, "actor_train"), process)
    strategy.initialize()
    under_way = most = 0

    def forward_ran(module: torch.nn.Module, arguments: Any, output: torch.Tensor) -> None:
        nonlocal under_way, most
        under_way += 1
        most = max(most, under_way)
        output.register_hook(backward_starts)

    def backward_starts(gradient: torch.Tensor) -> None:
        nonlocal under_way
        under_way -= 1

    models = [unwrap(chunk) for chunk in strategy.backend.model.chunks]
    for model in models:
        model.register_forward_hook(forward_ran)
    strategy.train_step(shard(batch, strategy.data_parallel_rank, strategy.data_parallel_size), step=1)
    assert under_way == 0
    parameters = [dict(model.named_parameters()) for model in models]
    buffers = [b for chunk in strategy.backend.model.chunks for b in (*chunk.buffers, *chunk.expert_parallel_buffers)]
    gathered = gathered_bytes(strategy)
    measured = Measured(
        place=(
            mpu.get_tensor_model_parallel_rank(),
            mpu.get_context_parallel_rank(),
            mpu.get_data_parallel_rank(),
            mpu.get_pipeline_model_parallel_rank(),
            mpu.get_expert_tensor_parallel_rank(),
            mpu.get_expert_model_parallel_rank(),
            mpu.get_expert_data_parallel_rank(),
        ),
        layers=[tuple(layer.layer_number - 1 for layer in model.decoder.layers) for model in models],
        moe_layers=[tuple(router.layer for router in chunk) for chunk in strategy.backend.model.routers],
        parameters=[sum(p.numel() for p in named.values()) for named in parameters],
        expert_parameters=[sum(p.numel() for name, p in named.items() if ".experts." in name) for named in parameters],
        weights=sum(p.nbytes for named in parameters for p in named.values()),
        gradients=sum(buffer.grad_data.nbytes for buffer in buffers),
        optimizer=_optimizer_bytes(
            strategy.backend.optimizer._optimizer, [p for named in parameters for p in named.values()]
        ),
        most_under_way=most,
        gathered=gathered,
    )
    strategy.close()
    return measured


def gathered_bytes(strategy: TrainStrategy) -> Counter[tuple[int, int]]:
    """Count the bytes that an export moves from this rank into each node, for each of `NODE_SIZES`."""
    import torch
    import torch.distributed as dist

    into: Counter[tuple[int, int]] = Counter()
    gather, exchange = dist.gather, dist.batch_isend_irecv

    def move(tensor: torch.Tensor, source: int, target: int) -> None:
        for size in NODE_SIZES:
            into[size, target // size] += tensor.nbytes * (source // size != target // size)

    def gathered(tensor: torch.Tensor, parts: Any, group: dist.ProcessGroup, group_dst: int) -> None:
        ranks = dist.get_process_group_ranks(group)
        move(tensor, dist.get_rank(), ranks[group_dst])
        gather(tensor, parts, group=group, group_dst=group_dst)

    def exchanged(operations: list[dist.P2POp]) -> list[dist.Work]:
        for operation in operations:
            if operation.op is dist.isend:
                move(operation.tensor, dist.get_rank(), operation.peer)
        return exchange(operations)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dist, "gather", gathered)
        patch.setattr(dist, "batch_isend_irecv", exchanged)
        for _ in strategy.export_weights():
            pass
    return into


def _optimizer_bytes(optimizer: Any, weights: list[Any]) -> int:
    """Count Adam's moments, and masters that are not views of the weights."""
    held = {weight.untyped_storage().data_ptr() for weight in weights}
    total = 0
    for part in getattr(optimizer, "chained_optimizers", [optimizer]):
        moments = [state[name] for state in part.optimizer.state.values() for name in ("exp_avg", "exp_avg_sq")]
        groups = [parameter for group in part.optimizer.param_groups for parameter in group["params"]]
        masters = [master for master in groups if master.untyped_storage().data_ptr() not in held]
        total += sum(tensor.nbytes for tensor in (*moments, *masters))
    return total


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_plan_says_what_every_rank_holds(name: str, gang: Gangs, models: dict[str, Path]) -> None:
    model, layout, dtype = LAYOUTS[name]
    checkpoint = models[model]
    case = Case(str(checkpoint), layout, dtype=dtype, micro_batch_size=1)
    config = case.config(4 // case.model_parallel_size)
    model = {"actor_train": json.loads((checkpoint / "config.json").read_text())}
    plans = {size: make_plan(config, model, devices_per_node=size) for size in NODE_SIZES}
    (role,) = plans[2].roles

    ranks = gang(4).run(measure, config, make_batch(checkpoint=checkpoint))

    for rank, (planned, real) in enumerate(zip(role.ranks, ranks, strict=True)):
        place = planned.place
        assert real.place == (place.tp, place.cp, place.dp, place.pp, place.etp, place.ep, place.edp), rank
        stage = role.stages[place.pp]
        assert real.layers == [chunk.layers for chunk in stage.chunks], rank
        assert real.moe_layers == [chunk.moe_layers for chunk in stage.chunks], rank
        assert real.expert_parameters == [chunk.expert_parameters for chunk in stage.chunks], rank
        assert real.parameters == [c.dense_parameters + c.expert_parameters for c in stage.chunks], rank
        assert real.weights == stage.memory.weights, rank
        # buffers and shards are padded
        assert real.gradients == pytest.approx(stage.memory.gradients, rel=0.02), rank
        assert real.optimizer == pytest.approx(stage.memory.optimizer, rel=0.02), rank
        assert real.most_under_way == sum(stage.memory.in_flight), rank
    gathered: Counter[tuple[int, int]] = sum((real.gathered for real in ranks), Counter())
    for size, planned in plans.items():
        into = [gathered[size, node] for node in range(4 // size)]
        # an expert bias has few numbers and is not a parameter
        assert (max(into), sum(into)) == pytest.approx(
            (planned.weight_sync.gathered_node, planned.weight_sync.gathered), rel=0.001
        )
