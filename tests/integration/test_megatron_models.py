"""Every architecture: weights in and out, log-probabilities, and gradients under replay, against transformers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from distributed import Gang
from megatron_cases import (
    FULL_RECOMPUTE,
    INTERLEAVED,
    Case,
    Reference,
    gradients,
    largest_difference,
    make_batch,
    make_model,
    read_weights,
    run_case,
)
from safetensors.torch import load_file, save_file

from roll_r3.models.facts import read_facts
from roll_r3.models.tiny import TINY_MODELS
from roll_r3.strategies.base import ProcessInfo

pytestmark = pytest.mark.integration
Gangs = Callable[[int], Gang]

TP2 = {"tensor_model_parallel_size": 2}
EP2 = {"expert_model_parallel_size": 2}
LAYOUTS = {
    "one process": (1, {}, False),
    "TP2 EP2 packed": (2, {"tensor_model_parallel_size": 2, "expert_model_parallel_size": 2}, True),
    "PP2 VPP2": (2, {**INTERLEAVED, **FULL_RECOMPUTE}, False),
    "CP2 packed": (2, {"context_parallel_size": 2}, True),
}


@pytest.mark.parametrize("layout_name", LAYOUTS)
@pytest.mark.parametrize("name", TINY_MODELS)
def test_gradients_equal_the_reference(name: str, layout_name: str, gang: Gangs, models: dict[str, Path]) -> None:
    size, layout, packed = LAYOUTS[layout_name]
    checkpoint = models[name]
    batch = make_batch(checkpoint=checkpoint)
    case = Case(str(checkpoint), layout, packed=packed, log_probs_first=True)

    outcomes = gang(size).run(run_case, case, batch)

    reference = Reference(str(checkpoint))
    wanted = reference.gradients(batch, case.config())
    found = gradients(read_weights(checkpoint), outcomes[0].weights)
    difference = largest_difference(found, wanted)
    log_probs = next(o.log_probs for o in outcomes if o.log_probs is not None)
    off = np.abs(log_probs - reference.tokens(batch, replay=True)[0].detach().numpy()).max()
    print(f"{name}, {layout_name}: |gradient - reference| {difference:.1e}, |log-prob - reference| {off:.1e}")
    assert difference < 1e-6
    assert off < 1e-5
    counts = outcomes[0].train_counts
    assert (
        counts.trainable
        == counts.trainable_replayed
        == batch.loss_mask_N.sum() * len(read_facts(checkpoint).moe_layers)
    )


@pytest.mark.parametrize("name", TINY_MODELS)
def test_native_log_probs_equal_transformers(name: str, gang: Gangs, models: dict[str, Path]) -> None:
    """Expert groups, expert bias and gate normalisation choose and weigh the same experts."""
    checkpoint = models[name]
    batch = make_batch(checkpoint=checkpoint)

    outcome = gang(1).run(run_case, Case(str(checkpoint), mode="disable", log_probs_first=True), batch)[0]

    wanted = Reference(str(checkpoint)).tokens(batch, replay=False)[0].detach().numpy()
    print(f"{name}: {np.abs(outcome.log_probs - wanted).max():.1e}")
    assert np.abs(outcome.log_probs - wanted).max() < 1e-5


@pytest.mark.parametrize(
    ("size", "layout", "dtype"),
    [
        (1, {}, "bf16"),
        (2, {**TP2, **EP2}, "fp32"),
        (2, INTERLEAVED, "bf16"),
        (2, {**TP2, "expert_tensor_parallel_size": 2}, "fp32"),
        (4, {**EP2, "pipeline_model_parallel_size": 2}, "bf16"),
    ],
)
@pytest.mark.parametrize("name", TINY_MODELS)
def test_export_is_bit_exact(
    name: str, size: int, layout: dict[str, Any], dtype: str, gang: Gangs, tmp_path: Path
) -> None:
    """In every layout the first rank gets the file's weights, names and precisions too (expert bias stays fp32)."""
    checkpoint = make_model(tmp_path, name, dtype=torch.bfloat16 if dtype == "bf16" else torch.float32)
    wanted = load_file(checkpoint / "model.safetensors")
    (first, again), *others = gang(size).run(_export_twice, Case(str(checkpoint), layout, dtype=dtype))
    for found in (first, again):
        assert {n: str(t.dtype) for n, t in wanted.items()} == {n: kind for n, (kind, _) in found.items()}
        assert all(np.array_equal(array, wanted[n].float().numpy()) for n, (_, array) in found.items())
    assert all(found == ({}, {}) for found in others)


def _export_twice(process: ProcessInfo, case: Case) -> tuple[dict[str, tuple[str, np.ndarray]], ...]:
    from roll_r3.strategies.train.megatron.strategy import MegatronTrain

    strategy = MegatronTrain(case.config(process.world_size // case.model_parallel_size), "actor_train", process)
    strategy.initialize()
    found = [
        {n: (str(t.dtype), t.float().cpu().numpy().copy()) for n, t in strategy.export_weights()} for _ in range(2)
    ]
    strategy.close()
    return tuple(found)


def test_a_saved_checkpoint_keeps_what_the_trainer_does_not_hold(gang: Gangs, tmp_path: Path) -> None:
    """Layers that predict further tokens: not built, not trained, not lost."""
    checkpoint = make_model(tmp_path / "source", "deepseek_v3")
    extra = {f"model.layers.4.{name}": torch.randn(3, 3) for name in ("eh_proj.weight", "mlp.experts.0.up_proj.weight")}
    save_file(extra, checkpoint / "model-mtp.safetensors", metadata={"format": "pt"})

    gang(2).run(_save, Case(str(checkpoint), INTERLEAVED), tmp_path / "saved")

    saved, source = read_weights(tmp_path / "saved"), read_weights(checkpoint)
    assert largest_difference(saved, source) == 0
    assert set(extra) < set(saved)


def _save(process: ProcessInfo, case: Case, path: Path) -> None:
    from roll_r3.strategies.train.megatron.strategy import MegatronTrain

    strategy = MegatronTrain(case.config(process.world_size // case.model_parallel_size), "actor_train", process)
    strategy.initialize()
    strategy.save_hf(path)
    strategy.close()
