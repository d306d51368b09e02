"""Every architecture: weights in and out, log-probabilities, and gradients under replay, against transformers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from distributed import Gang
from epsilon import with_one_epsilon
from megatron_cases import (
    FULL_RECOMPUTE,
    INTERLEAVED,
    Case,
    Reference,
    assert_copies_agree,
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
    """Compare effects of expert groups, expert bias and gate normalisation."""
    checkpoint = models[name]
    batch = make_batch(checkpoint=checkpoint)

    outcome = gang(1).run(run_case, Case(str(checkpoint), mode="disable", log_probs_first=True), batch)[0]

    wanted = Reference(str(checkpoint)).tokens(batch, replay=False)[0].detach().numpy()
    print(f"{name}: {np.abs(outcome.log_probs - wanted).max():.1e}")
    assert np.abs(outcome.log_probs - wanted).max() < 1e-5


def selective(*modules: str) -> dict[str, object]:
    return {"recompute_granularity": "selective", "recompute_modules": modules}


UNIFORM = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 2}
FOURS = {
    "TP4 above 2 key and value heads": (
        "qwen3_moe_mixed",
        {"tensor_model_parallel_size": 4, **selective("core_attn", "mlp")},
        False,
    ),
    "TP4 EP2 of latent attention": (
        "moonlight",
        {"tensor_model_parallel_size": 4, **EP2, **selective("mla_up_proj", "shared_experts")},
        True,
    ),
    "PP4": (
        "deepseek_v3",
        {"pipeline_model_parallel_size": 4, **selective("core_attn", "mla_up_proj", "mlp", "shared_experts")},
        True,
    ),
    "CP4 packed": ("qwen2_moe", {"context_parallel_size": 4, **UNIFORM}, True),
    "CP4 EP4": ("mixtral", {"context_parallel_size": 4, "expert_model_parallel_size": 4, **UNIFORM}, False),
}
"""Cases outside the matrix: four ranks in one dimension, and recompute settings not in the matrix.

The matrix mixes dimensions, so it has no room for four ranks in one.
"""


@pytest.mark.parametrize("name", FOURS)
def test_four_ranks_in_one_dimension_equal_the_reference(name: str, gang: Gangs, models: dict[str, Path]) -> None:
    model, layout, packed = FOURS[name]
    checkpoint = models[model]
    batch = make_batch(checkpoint=checkpoint)
    case = Case(str(checkpoint), layout, packed=packed)

    outcomes = gang(4).run(run_case, case, batch)

    found = gradients(read_weights(checkpoint), outcomes[0].weights)
    difference = largest_difference(found, Reference(str(checkpoint)).gradients(batch, case.config()))
    print(f"{name}: largest |gradient - reference| {difference:.1e}")
    assert difference < 1e-6
    assert_copies_agree(outcomes)
    counts = outcomes[0].train_counts
    assert counts.trainable == counts.trainable_replayed > 0


HALF = {"rope_theta": 300.0, "rms_norm_eps": 1e-2}
READ: dict[str, dict[str, Any]] = {
    "qwen3_moe": {"head_dim": 24, "norm_topk_prob": False, "moe_intermediate_size": 48, "decoder_sparse_step": 2},
    "qwen2_moe": {"qkv_bias": False, "norm_topk_prob": True, "shared_expert_intermediate_size": 48},
    "olmoe": {"norm_topk_prob": True},
    "mixtral": {"head_dim": 24, "num_experts_per_tok": 3},
    "deepseek_v3": {
        "n_shared_experts": 2,
        "routed_scaling_factor": 1.5,
        "first_k_dense_replace": 2,
        "v_head_dim": 24,
        "qk_rope_head_dim": 12,
        "rope_scaling": {
            "rope_type": "yarn",
            "factor": 8.0,
            "original_max_position_embeddings": 64,
            "beta_fast": 16,
            "beta_slow": 2,
            "mscale": 0.7,
            "mscale_all_dim": 1.2,
        },
    },
    "moonlight": {"q_lora_rank": 24, "routed_scaling_factor": 1.5, "n_shared_experts": 2},
}
"""Fields of config.json with values different from the tiny models' ones; none may be replaced by a default."""


@pytest.mark.parametrize("engine", ["megatron", "fsdp2"])
@pytest.mark.parametrize("name", READ)
def test_fields_of_config_json_are_built_as_they_say(name: str, engine: str, gang: Gangs, tmp_path: Path) -> None:
    checkpoint = make_model(tmp_path, name, **HALF, **READ[name])
    batch = make_batch(checkpoint=checkpoint)
    case = Case(str(checkpoint), log_probs_first=True, engine=engine)

    outcome = gang(1).run(run_case, case, batch)[0]

    reference = Reference(str(checkpoint))
    difference = largest_difference(
        gradients(read_weights(checkpoint), outcome.weights), reference.gradients(batch, case.config())
    )
    off = np.abs(outcome.log_probs - reference.tokens(batch, replay=True)[0].detach().numpy()).max()
    print(f"{name}, {engine}: |gradient - reference| {difference:.1e}, |log-prob - reference| {off:.1e}")
    assert difference < 1e-6
    assert off < 1e-5


SEEN = {"rope_theta": 1e4, "rms_norm_eps": 1e-5, "routed_scaling_factor": 2.5}
"""Other values of some of these fields, without a change of the weights' shapes."""


@pytest.mark.parametrize("name", READ)
def test_the_comparison_would_see_a_field_that_is_not_read(name: str, tmp_path: Path) -> None:
    checkpoint = make_model(tmp_path / "m", name, **HALF, **READ[name])
    batch = make_batch(checkpoint=checkpoint)
    wanted = Reference(str(checkpoint)).tokens(batch, replay=True)[0]
    for field, value in SEEN.items():
        other = Reference(str(checkpoint))
        if field == "routed_scaling_factor" and not hasattr(other.model.config, field):
            continue
        if field == "rope_theta":
            other.model.config.rope_parameters["rope_theta"] = value
            rotary = other.model.model.rotary_emb
            other.model.model.rotary_emb = type(rotary)(other.model.config)
        elif field == "rms_norm_eps":
            other.model.config.rms_norm_eps = value
            with_one_epsilon(other.model)
        else:
            setattr(other.model.config, field, value)
        assert (other.tokens(batch, replay=True)[0] - wanted).abs().max() > 1e-3, field


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
    """Export in every layout: the first rank gets the file's weights, names and dtypes (the expert bias stays fp32)."""
    checkpoint = make_model(tmp_path, name, dtype=torch.bfloat16 if dtype == "bf16" else torch.float32)
    wanted = load_file(checkpoint / "model.safetensors")
    (first, again), *others = gang(size).run(_export_twice, Case(str(checkpoint), layout, dtype=dtype))
    for found in (first, again):
        assert {n: str(t.dtype) for n, t in wanted.items()} == {n: kind for n, (kind, _) in found.items()}
        assert all(np.array_equal(array, wanted[n].float().numpy()) for n, (_, array) in found.items())
    assert all(found == ({}, {}) for found in others)


def _export_twice(process: ProcessInfo, case: Case) -> tuple[dict[str, tuple[str, np.ndarray]], ...]:
    from roll_r3.trainers.megatron.strategy import MegatronTrain

    strategy = MegatronTrain(case.view(process.world_size // case.model_parallel_size), process)
    strategy.initialize()
    found = [
        {n: (str(t.dtype), t.float().cpu().numpy().copy()) for n, t in strategy.export_weights()} for _ in range(2)
    ]
    strategy.close()
    return tuple(found)


def test_a_saved_checkpoint_keeps_what_the_trainer_does_not_hold(gang: Gangs, tmp_path: Path) -> None:
    """Save a checkpoint with layers for further tokens: not built, not trained, not lost."""
    checkpoint = make_model(tmp_path / "source", "deepseek_v3")
    extra = {f"model.layers.4.{name}": torch.randn(3, 3) for name in ("eh_proj.weight", "mlp.experts.0.up_proj.weight")}
    save_file(extra, checkpoint / "model-mtp.safetensors", metadata={"format": "pt"})

    gang(2).run(_save, Case(str(checkpoint), INTERLEAVED), tmp_path / "saved")

    saved, source = read_weights(tmp_path / "saved"), read_weights(checkpoint)
    assert largest_difference(saved, source) == 0
    assert set(extra) < set(saved)


def _save(process: ProcessInfo, case: Case, path: Path) -> None:
    from roll_r3.trainers.megatron.strategy import MegatronTrain

    strategy = MegatronTrain(case.view(process.world_size // case.model_parallel_size), process)
    strategy.initialize()
    strategy.save_hf(path)
    strategy.close()
