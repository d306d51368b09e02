"""One optimizer step a rollout: the ratio is exactly 1, with and without a pass before the update, on both trainers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from distributed import Gang
from megatron_cases import (
    FULL_RECOMPUTE,
    INTERLEAVED,
    LAYERS,
    TOP_K,
    Case,
    exported,
    make_batch,
    open_strategy,
    shard,
)

from roll_r3.batch.batch import Batch
from roll_r3.errors import RollError
from roll_r3.strategies.base import ProcessInfo

pytestmark = pytest.mark.integration
Gangs = Callable[[int], Gang]

CASES = [
    ("R3", "fsdp2", {"recompute": True}, False),
    ("R3", "fsdp2", {}, True),
    ("R3", "megatron", {"expert_model_parallel_size": 2, **FULL_RECOMPUTE}, False),
    ("R3", "megatron", {"tensor_model_parallel_size": 2}, True),
    ("R3", "megatron", {"context_parallel_size": 2}, True),
    ("R3", "megatron", {**INTERLEAVED, **FULL_RECOMPUTE}, False),
    ("R2", "fsdp2", {"recompute": True}, True),
    ("R2", "megatron", {"tensor_model_parallel_size": 2}, False),
    ("disable", "fsdp2", {}, False),
    ("disable", "megatron", {"context_parallel_size": 2}, False),
]


@pytest.mark.parametrize(("mode", "engine", "layout", "packed"), CASES)
def test_the_update_finds_what_a_pass_before_it_would(
    mode: str, engine: str, layout: dict[str, Any], packed: bool, gang: Gangs, tiny_moe: Path
) -> None:
    """Compare in bf16, to the last bit: log-probabilities, entropies, the new weights, and replay counts."""
    batch = make_batch(unknown=0.1)
    batch = batch if mode == "R3" else replace(batch, routes=None)
    case = Case(str(tiny_moe), layout, mode, packed, "bf16", infer_batch_size=2, engine=engine)

    runs = [gang(2).run(_step, case, batch, with_pass) for with_pass in (True, False)]

    for with_pass, without in zip(*runs, strict=True):
        assert without["ratios"] == with_pass["ratios"] == (1, 1)
        for found, wanted in ((without["values"], with_pass["values"]), (without["weights"], with_pass["weights"])):
            assert found.keys() == wanted.keys()
            assert [name for name, array in wanted.items() if not np.array_equal(found[name], array)] == []
        if mode == "R3":
            known = sum(int(routes.known_R.sum()) for routes in batch.routes)
            assert without["compared"] == with_pass["compared"]
            assert without["compared"][0] == known * LAYERS > without["compared"][1] > 0
            assert np.array_equal(without["load"], with_pass["load"])
        else:
            assert without["compared"] == (0, 0)


def _step(process: ProcessInfo, case: Case, batch: Batch, with_pass: bool) -> dict[str, Any]:
    """Return results of a training step, with or without a previous pass for old log-probabilities."""
    strategy = open_strategy(process, case)
    part = replace(shard(batch, strategy.data_parallel_rank, strategy.data_parallel_size), old_log_probs_N=None)
    before = strategy.compute_log_probs(part) if with_pass or case.mode == "R2" else None
    if with_pass:
        part = replace(part, old_log_probs_N=_shared_in_shard(strategy, before.log_probs_N))
    result = strategy.train_step(part, step=1)
    source = before if with_pass else result
    assert (source.log_probs_N is not None) == (source.entropy_N is not None) == strategy.returns_results
    counts = source.replay if case.mode == "R3" else result.replay
    found = {
        "ratios": (result.metrics["actor/ratio_min"], result.metrics["actor/ratio_max"]),
        "values": {"log_probs": source.log_probs_N, "entropy": source.entropy_N} if strategy.returns_results else {},
        "weights": dict(exported(strategy)),
        "compared": (counts.compared, counts.agreed) if counts else (0, 0),
        "load": source.load.counts_2ME if case.mode == "R3" else None,
    }
    strategy.close()
    return found


def _shared_in_shard(strategy: Any, log_probs_N: np.ndarray | None) -> np.ndarray:
    """Return one rank's results on every rank of its shard, as distributed by the driver."""
    import torch.distributed as dist

    ranks: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(ranks, (strategy.data_parallel_rank, log_probs_N))
    return next(found for dp_rank, found in ranks if dp_rank == strategy.data_parallel_rank and found is not None)


@pytest.mark.parametrize("engine", ["fsdp2", "megatron"])
def test_by_default_both_passes_round_alike(engine: str, gang: Gangs, models: dict[str, Path]) -> None:
    """Contrast with a micro-batch of another size: it rounds differently in bf16 and moves the ratios."""
    batch = replace(make_batch(checkpoint=models["qwen3_moe"]), routes=None)
    case = Case(str(models["qwen3_moe"]), mode="disable", dtype="bf16", engine=engine, infer_batch_size=None)
    alike, other = (gang(1).run(_ratios, c, batch)[0] for c in (case, replace(case, infer_batch_size=8)))
    assert alike == (1, 1)
    assert other[0] < 0.999 or other[1] > 1.001


def _ratios(process: ProcessInfo, case: Case, batch: Batch) -> tuple[float, float]:
    """Return (smallest, largest) ratio to the log-probabilities of a pass before the update."""
    strategy = open_strategy(process, case)
    metrics = strategy.train_step(
        replace(batch, old_log_probs_N=strategy.compute_log_probs(batch).log_probs_N), step=1
    ).metrics
    strategy.close()
    return metrics["actor/ratio_min"], metrics["actor/ratio_max"]


@pytest.mark.parametrize("engine", ["fsdp2", "megatron"])
def test_several_optimizer_steps_need_old_log_probs(engine: str, gang: Gangs, tiny_moe: Path) -> None:
    case = Case(str(tiny_moe), mode="disable", engine=engine, micro_batch_size=1, mini_batches=2)
    gang(1).run(_refused, case, make_batch())


def _refused(process: ProcessInfo, case: Case, batch: Batch) -> None:
    strategy = open_strategy(process, case)
    with pytest.raises(RollError, match="without old log-probabilities came to 2 optimizer steps"):
        strategy.train_step(replace(batch, old_log_probs_N=None), step=1)
    strategy.close()


@pytest.mark.parametrize("engine", ["fsdp2", "megatron"])
def test_against_the_rollout_the_first_optimizer_step_reports_agreement_and_load(
    engine: str, gang: Gangs, tiny_moe: Path
) -> None:
    """With `rollout_correction.bypass` no pass before the update can."""
    options = {"rollout_correction": {"bypass": True}}
    case = Case(str(tiny_moe), mode="R3", engine=engine, micro_batch_size=1, mini_batches=2, options=options)
    gang(1).run(_bypassed, case, make_batch())


def _bypassed(process: ProcessInfo, case: Case, batch: Batch) -> None:
    strategy = open_strategy(process, case)
    result = strategy.train_step(replace(batch, old_log_probs_N=batch.rollout_log_probs_N), step=1)
    assert 0 < result.replay.agreed < result.replay.compared < batch.lengths_n.sum() * LAYERS
    assert result.load.counts_2ME.sum((1, 2)).tolist() == [result.replay.compared * TOP_K] * 2
    assert result.metrics["actor/ratio_min"] < 1 < result.metrics["actor/ratio_max"]
    strategy.close()
