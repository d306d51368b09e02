"""Optimizer steps with a gradient or loss that is not finite: every rank skips them, and no state changes.

The batches themselves are bad; with several data-parallel ranks, on one of them only.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from distributed import Gang
from megatron_cases import FULL_RECOMPUTE, INTERLEAVED, Case, make_batch, open_strategy, shard

from roll_r3.batch.batch import Batch
from roll_r3.errors import RollError
from roll_r3.strategies.base import ProcessInfo

pytestmark = pytest.mark.integration
Gangs = Callable[[int], Gang]

TRAINING = {"learning_rate": 1e-2, "weight_decay": 0.1, "warmup_steps": 5, "max_grad_norm": 0.5}
"""Training arguments with another learning rate at every step."""
EXPERTS = {"expert_model_parallel_size": 2}
MOVING = {"moe_router_bias_update_rate": 0.25}
SAMPLE = 1
"""Index of the bad sample in a batch; with two data-parallel ranks it belongs to the second."""


def spoiled(batch: Batch, field: str, value: float) -> Batch:
    """Return a batch with `value` at one trained token of `SAMPLE`."""
    begin, end = batch.offsets[SAMPLE : SAMPLE + 2]
    values = getattr(batch, field).copy()
    values[begin + np.flatnonzero(batch.loss_mask_N[begin:end])[0]] = value
    return replace(batch, **{field: values})


BAD = {
    "advantage": ("advantages_N", math.inf),
    "old log-probability": ("old_log_probs_N", math.nan),
    "reference": ("ref_log_probs_N", math.nan),
}
"""Ways to make a batch bad. The last two make the loss NaN; the gradient is clamped away."""


@pytest.mark.parametrize(
    ("engine", "model", "layout", "dtype", "bad"),
    [
        ("megatron", "deepseek_v3", {"tensor_model_parallel_size": 2, **EXPERTS, **MOVING}, "fp32", "advantage"),
        ("megatron", "deepseek_v3", {"use_distributed_optimizer": True, **MOVING}, "bf16", "old log-probability"),
        ("megatron", "qwen3_moe", {"use_distributed_optimizer": False}, "bf16", "advantage"),
        ("megatron", "qwen3_moe", {**INTERLEAVED, **FULL_RECOMPUTE}, "fp32", "reference"),
        ("fsdp2", "qwen3_moe", {}, "fp32", "advantage"),
        ("fsdp2", "qwen3_moe", {}, "bf16", "old log-probability"),
    ],
)
def test_a_step_that_is_left_out_leaves_no_trace(
    engine: str,
    model: str,
    layout: dict[str, Any],
    dtype: str,
    bad: str,
    gang: Gangs,
    models: dict[str, Path],
) -> None:
    """Compare later steps to the bit with those of a run without the skipped step."""
    case = Case(
        str(models[model]),
        layout,
        dtype=dtype,
        engine=engine,
        training=TRAINING,
        options={"use_kl_loss": True, "kl_loss_coef": 0.1} if bad == "reference" else {},
    )
    before, after = (make_batch(seed, checkpoint=models[model]) for seed in (0, 1))
    ranks = gang(2).run(_left_out, case, before, spoiled(before, *BAD[bad]), after)
    (told,) = {told for told, *_ in ranks}
    for (_, metrics, state), (others, wanted) in zip(ranks, gang(2).run(_never_saw, case, before, after), strict=True):
        assert metrics == others
        assert differing(state, wanted) == []
    if bad != "advantage":
        assert told.startswith("step 2: the loss is not finite (the gradient norm is ")
    else:
        assert told in (f"step 2: the gradient norm is {x}: optimizer step 1 was skipped" for x in ("nan", "inf"))


Remembered = dict[str, torch.Tensor]


def _left_out(
    process: ProcessInfo, case: Case, before: Batch, bad: Batch, after: Batch
) -> tuple[str, dict[str, float], Remembered]:
    strategy = open_strategy(process, case)
    take_step(strategy, before, 1)
    state = remembered(strategy)
    result = take_step(strategy, bad, 2)
    assert differing(state, remembered(strategy)) == []
    assert result.metrics == {"actor_train/optimizer_steps": 0, "actor_train/skipped_steps": 1}
    made = take_step(strategy, after, 3)
    assert not made.skipped
    assert differing(state, remembered(strategy)) != []
    state = remembered(strategy)
    strategy.close()
    (told,) = result.skipped
    return told, made.metrics, state


def _never_saw(process: ProcessInfo, case: Case, before: Batch, after: Batch) -> tuple[dict[str, float], Remembered]:
    strategy = open_strategy(process, case)
    take_step(strategy, before, 1)
    metrics = take_step(strategy, after, 3).metrics
    state = remembered(strategy)
    strategy.close()
    return metrics, state


def take_step(strategy: Any, batch: Batch, step: int) -> Any:
    return strategy.train_step(shard(batch, strategy.data_parallel_rank, strategy.data_parallel_size), step)


def remembered(strategy: Any) -> Remembered:
    """Return copies of this rank's state: weights, masters, moments, biases, counts."""
    found: dict[str, Any] = {}
    if hasattr(strategy.backend.model, "chunks"):
        for index, chunk in enumerate(strategy.backend.model.chunks):
            for name, tensor in (*chunk.named_parameters(), *chunk.named_buffers()):
                found[f"{index}.{name}"] = tensor
        for index, slot in enumerate(strategy.backend.optimizer.slots()):
            found |= {f"slot {index}.{name}": value for name, value in (("main", slot.main), *slot.state.items())}
        found["lr"] = torch.tensor([group["lr"] for group in strategy.backend.optimizer._optimizer.param_groups])
        found["done"] = torch.tensor(strategy.backend.optimizer.done)
    else:
        found = strategy.backend.state()
        for index, kept in enumerate(strategy.backend.optimizer._optimizer.state.values()):
            found[f"{index}.step"] = kept["step"]
    assert any("exp_avg_sq" in name for name in found)
    return {
        name: (value.to_local() if hasattr(value, "to_local") else value).detach().clone()
        for name, value in found.items()
        if isinstance(value, torch.Tensor)
    }


def differing(a: Remembered, b: Remembered) -> list[str]:
    assert set(a) == set(b)
    return [name for name in a if not torch.equal(a[name], b[name])]


@pytest.mark.parametrize("engine", ["megatron", "fsdp2"])
def test_figures_are_those_of_the_steps_that_were_made(engine: str, gang: Gangs, tiny_moe: Path) -> None:
    """Make two optimizer steps, one of them bad."""
    case = Case(str(tiny_moe), engine=engine, micro_batch_size=1, mini_batches=2, training=TRAINING)
    spoilt = spoiled(make_batch(), "advantages_N", math.nan)
    bad, good = (gang(2).run(_figures, case, make_batch(), batch)[0] for batch in (spoilt, make_batch()))
    assert all(math.isfinite(value) for value in bad.values())
    assert (bad["actor_train/optimizer_steps"], bad["actor_train/skipped_steps"]) == (1, 1)
    assert (good["actor_train/optimizer_steps"], good["actor_train/skipped_steps"]) == (2, 0)
    assert set(bad) == set(good)
    # two steps were made before; the learning rate rises with each step
    assert bad["actor/lr"] == pytest.approx(TRAINING["learning_rate"] * 3 / TRAINING["warmup_steps"])
    assert good["actor/lr"] == pytest.approx(TRAINING["learning_rate"] * 4 / TRAINING["warmup_steps"])


def _figures(process: ProcessInfo, case: Case, first: Batch, second: Batch) -> dict[str, float]:
    strategy = open_strategy(process, case)
    take_step(strategy, first, 1)
    metrics: dict[str, float] = take_step(strategy, second, 2).metrics
    strategy.close()
    return metrics


@pytest.mark.parametrize("engine", ["megatron", "fsdp2"])
def test_too_many_in_a_row_stop_every_rank(engine: str, gang: Gangs, tiny_moe: Path) -> None:
    case = Case(str(tiny_moe), engine=engine, training=TRAINING | {"max_skipped_steps": 1})
    for said in gang(2).run(_stopped, case, make_batch(), spoiled(make_batch(), "advantages_N", math.nan)):
        assert said.startswith(
            "the gradient norm is nan: the optimizer did not step (step 4, optimizer step 1), which makes 2 in a row "
            "where max_skipped_steps allows 1. Before it, without one that was made in between: step 3: the gradient "
            "norm is nan: optimizer step 1 was skipped. Look for extreme ratios"
        )


def _stopped(process: ProcessInfo, case: Case, good: Batch, bad: Batch) -> str:
    strategy = open_strategy(process, case)
    for step, batch in enumerate((bad, good, bad), 1):  # a good step ends the row
        take_step(strategy, batch, step)
    state = remembered(strategy)
    with pytest.raises(RollError) as stopped:
        take_step(strategy, bad, 4)
    assert differing(state, remembered(strategy)) == []
    strategy.close()
    return str(stopped.value)


def test_the_first_one_stops_the_run_where_none_is_allowed(gang: Gangs, models: dict[str, Path]) -> None:
    """Include a moving expert bias: it must not move."""
    checkpoint = models["deepseek_v3"]
    case = Case(str(checkpoint), dict(MOVING), training=TRAINING | {"max_skipped_steps": 0})
    bad = spoiled(make_batch(checkpoint=checkpoint), "advantages_N", math.inf)
    for said in gang(2).run(_stopped_at_once, case, bad):
        assert "1 in a row where max_skipped_steps allows 0. Look for" in said


def _stopped_at_once(process: ProcessInfo, case: Case, bad: Batch) -> str:
    strategy = open_strategy(process, case)
    state = remembered(strategy)
    with pytest.raises(RollError) as stopped:
        take_step(strategy, bad, 1)
    assert differing(state, remembered(strategy)) == []
    strategy.close()
    return str(stopped.value)


def test_weights_that_are_not_finite_end_the_run_after_a_few_steps(gang: Gangs, tiny_moe: Path) -> None:
    """Break a weight on one rank: no batch can repair it."""
    case = Case(str(tiny_moe), {"tensor_model_parallel_size": 2}, training=TRAINING | {"max_skipped_steps": 2})
    gang(2).run(_broken_weight, case, make_batch())


def _broken_weight(process: ProcessInfo, case: Case, batch: Batch) -> None:
    strategy = open_strategy(process, case)
    if process.rank == 1:
        with torch.no_grad():
            next(p for chunk in strategy.backend.model.chunks for p in chunk.parameters()).fill_(math.nan)
    for step in (1, 2):
        assert take_step(strategy, batch, step).skipped
    with pytest.raises(RollError, match="3 in a row"):
        take_step(strategy, batch, 3)
    strategy.close()
