"""The expert bias through real schedules: its loads are of real tokens, summed over every rank that splits them."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from distributed import Gang
from megatron_cases import EXPERTS, FULL_RECOMPUTE, INTERLEAVED, LAYERS, Case, make_batch, shard

from roll_r3.batch.batch import Batch
from roll_r3.strategies.base import ProcessInfo

pytestmark = pytest.mark.integration
Gangs = Callable[[int], Gang]
RATE = 0.25


@pytest.mark.parametrize(
    ("size", "layout", "packed"),
    [
        (1, FULL_RECOMPUTE, False),
        (2, {"tensor_model_parallel_size": 2}, False),
        (2, {"context_parallel_size": 2}, True),
        (2, {**INTERLEAVED, **FULL_RECOMPUTE}, False),
        (2, {"expert_model_parallel_size": 2, **FULL_RECOMPUTE}, False),
    ],
)
def test_the_bias_follows_the_recorded_loads(
    size: int, layout: dict, packed: bool, gang: Gangs, tiny_moe: Path
) -> None:
    batch = make_batch()
    ranks = gang(size).run(_biases, Case(str(tiny_moe), layout, packed=packed), batch, RATE)

    for bias in ranks:
        for layer, found in bias.items():
            ids = np.concatenate([routes.ids_MRK[layer].reshape(-1) for routes in batch.routes])
            loads = np.bincount(ids, minlength=EXPERTS)
            assert found.tolist() == (RATE * np.sign(loads.mean() - loads)).tolist()
    assert {layer for bias in ranks for layer in bias} == set(range(LAYERS))


@pytest.mark.parametrize("mode", ["disable", "R2"])
def test_without_recorded_rows_padding_stays_out_too(mode: str, gang: Gangs, tiny_moe: Path) -> None:
    """The loads that megatron sums do not depend on how much padding the cut of the micro-batches brought."""
    batch = make_batch()
    few, many = (
        gang(1).run(_loads, Case(str(tiny_moe), mode=mode, micro_batch_size=size, infer_batch_size=size), batch)[0]
        for size in (1, 4)
    )
    assert few.sum() == many.sum() == batch.lengths_n.sum() * LAYERS * 2
    assert np.array_equal(few, many)


def test_a_rate_of_0_moves_nothing(gang: Gangs, tiny_moe: Path) -> None:
    for bias in gang(1).run(_biases, Case(str(tiny_moe)), make_batch(), 0.0):
        assert not any(found.any() for found in bias.values())


def _with_bias(process: ProcessInfo, case: Case, rate: float) -> Any:
    """A Qwen3-MoE whose routers get an expert bias: DeepSeek's own attention needs a GPU."""
    from roll_r3.strategies.train.megatron.strategy import MegatronTrain

    strategy = MegatronTrain(case.config(process.world_size // case.model_parallel_size), "actor_train", process)
    strategy.initialize()
    config = strategy.model.config
    config.moe_router_enable_expert_bias, config.moe_router_bias_update_rate = True, rate
    for router in (router for chunk in strategy.model.routers for router in chunk):
        router.module.enable_expert_bias, router.module.score_function = True, "sigmoid"
        for name in ("local_tokens_per_expert", "expert_bias"):
            delattr(router.module, name)
            router.module.register_buffer(name, torch.zeros(EXPERTS), persistent=False)
    return strategy


def _step(strategy: Any, batch: Batch) -> None:
    part = shard(batch, strategy.data_parallel_rank, strategy.data_parallel_size)
    strategy.compute_log_probs(part)
    strategy.train_step(part, step=1)


def _biases(process: ProcessInfo, case: Case, batch: Batch, rate: float) -> dict[int, npt.NDArray[np.float32]]:
    strategy = _with_bias(process, case, rate)
    _step(strategy, batch)
    routers = [router for chunk in strategy.model.routers for router in chunk]
    assert not any(router.module.local_tokens_per_expert.any() for router in routers)
    bias = {router.layer: router.module.expert_bias.numpy().copy() for router in routers}
    strategy.close()
    return bias


def _loads(process: ProcessInfo, case: Case, batch: Batch) -> npt.NDArray[np.float32]:
    """What megatron moves the bias by. [layers, E]"""
    strategy = _with_bias(process, case, RATE)
    finalize = import_module("megatron.core.distributed.finalize_model_grads")  # a function hides it
    update = finalize.get_updated_expert_bias
    seen = []

    def spied(loads: torch.Tensor, *args: Any) -> torch.Tensor:
        updated = update(loads, *args)
        seen.append(loads.numpy().copy())
        return updated

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(finalize, "get_updated_expert_bias", spied)
        _step(strategy, batch)
    strategy.close()
    (loads,) = seen
    return loads
