"""DeepSeek's expert bias in real schedules: loads count real tokens, summed over all ranks.

The batches are routed by recorded rows; the expected loads are counts of these rows.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from distributed import Gang
from megatron_cases import FULL_RECOMPUTE, INTERLEAVED, Case, Weights, exported, make_batch, read_weights, shard

from roll_r3.batch.batch import Batch
from roll_r3.models.facts import read_facts
from roll_r3.strategies.base import ProcessInfo

pytestmark = pytest.mark.integration
Gangs = Callable[[int], Gang]
RATE = 0.25
BIAS = "model.layers.{}.mlp.gate.e_score_correction_bias"


@pytest.fixture(scope="session")
def deepseek(models: dict[str, Path]) -> Path:
    return models["deepseek_v3"]


def moving(checkpoint: Path, layout: dict[str, Any], rate: float = RATE) -> Case:
    return Case(str(checkpoint), {**layout, "moe_router_bias_update_rate": rate})


@pytest.mark.parametrize(
    ("size", "layout", "packed", "dtype", "length"),
    [
        (1, FULL_RECOMPUTE, False, "fp32", None),
        (2, {"tensor_model_parallel_size": 2}, False, "fp32", None),
        (2, {"context_parallel_size": 2}, True, "fp32", None),
        (2, {**INTERLEAVED, **FULL_RECOMPUTE}, False, "fp32", None),
        (2, {"expert_model_parallel_size": 2, **FULL_RECOMPUTE}, False, "fp32", None),
        # too many tokens for an exact count in bf16
        (2, {"tensor_model_parallel_size": 2, "expert_model_parallel_size": 2}, False, "bf16", 401),
    ],
)
def test_the_bias_follows_the_recorded_loads(
    size: int, layout: dict[str, Any], packed: bool, dtype: str, length: int | None, gang: Gangs, deepseek: Path
) -> None:
    facts = read_facts(deepseek)
    before, batch = read_weights(deepseek), make_batch(checkpoint=deepseek, length=length)
    case = replace(moving(deepseek, layout), packed=packed, dtype=dtype)

    ranks = gang(size).run(_biases, case, batch)

    for row, layer in enumerate(facts.moe_layers):
        ids = np.concatenate([routes.ids_MRK[row].reshape(-1) for routes in batch.routes])
        loads = np.bincount(ids, minlength=facts.num_experts)
        assert length is None or loads.max() > 256
        wanted = before[BIAS.format(layer)] + np.float32(RATE) * np.sign(loads.mean() - loads).astype(np.float32)
        held = [live[layer] for _, live in ranks if layer in live]
        assert held, f"no rank holds layer {layer}"
        assert all(bias.tolist() == wanted.tolist() for bias in (*held, ranks[0][0][BIAS.format(layer)]))
    assert len(ranks[0][0]) == len(facts.moe_layers)


@pytest.mark.parametrize("mode", ["disable", "R2"])
def test_without_recorded_rows_padding_stays_out_too(mode: str, gang: Gangs, deepseek: Path) -> None:
    """Compare loads summed by megatron for two amounts of padding in the micro-batches."""
    batch, facts = make_batch(checkpoint=deepseek), read_facts(deepseek)
    few, many = (
        gang(1).run(
            _loads, replace(moving(deepseek, {}), mode=mode, micro_batch_size=size, infer_batch_size=size), batch
        )[0]
        for size in (1, 4)
    )
    assert few.sum() == many.sum() == batch.lengths_n.sum() * len(facts.moe_layers) * facts.top_k
    assert np.array_equal(few, many)


def test_a_rate_of_0_moves_nothing(gang: Gangs, deepseek: Path) -> None:
    ((found, _),) = gang(1).run(_biases, moving(deepseek, {}, rate=0.0), make_batch(checkpoint=deepseek))
    before = read_weights(deepseek)
    assert found
    assert all(np.array_equal(bias, before[name]) for name, bias in found.items())


def _trainer(process: ProcessInfo, case: Case) -> Any:
    from roll_r3.trainers.megatron.strategy import MegatronTrain

    strategy = MegatronTrain(case.view(process.world_size // case.model_parallel_size), process)
    strategy.initialize()
    return strategy


def _step(strategy: Any, batch: Batch) -> None:
    part = shard(batch, strategy.data_parallel_rank, strategy.data_parallel_size)
    strategy.compute_log_probs(part)
    strategy.train_step(part, step=1)


def _biases(process: ProcessInfo, case: Case, batch: Batch) -> tuple[Weights, dict[int, npt.NDArray[np.float32]]]:
    """Return the biases after a step: the exported ones by checkpoint name, and those in this rank's layers."""
    strategy = _trainer(process, case)
    _step(strategy, batch)
    routers = [router for chunk in strategy.backend.model.routers for router in chunk]
    assert not any(router.module.local_tokens_per_expert.any() for router in routers)
    biases = {name: bias for name, bias in exported(strategy) if name.endswith("e_score_correction_bias")}
    live = {router.layer: router.module.expert_bias.cpu().numpy().copy() for router in routers}
    strategy.close()
    return biases, live


def _loads(process: ProcessInfo, case: Case, batch: Batch) -> npt.NDArray[np.float32]:
    """Return megatron's loads for the update of the bias. [layers, E]"""
    strategy = _trainer(process, case)
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
