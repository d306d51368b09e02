"""FSDP2 trainer against transformers, one sample at a time, and against Megatron."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fsdp2_cases import BUDGET, RECOMPUTE, Gangs, fsdp2, raw_gradients
from megatron_cases import (
    LAYERS,
    SAMPLES,
    Case,
    Reference,
    assert_load,
    at_rest,
    exported,
    gradients,
    largest_difference,
    make_batch,
    open_strategy,
    read_weights,
    run_case,
    shard,
)

from roll_r3.batch.batch import Batch
from roll_r3.batch.routes import RoutedExperts
from roll_r3.models.facts import read_facts
from roll_r3.models.tiny import TINY_MODELS, make_tiny_checkpoint
from roll_r3.strategies.base import ProcessInfo

pytestmark = pytest.mark.integration


# Loss and gradients


@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"packed": True, "layout": RECOMPUTE, "options": {"loss_agg_mode": "seq-mean-token-sum-norm"}},
        {"role": {**BUDGET, "sequence_length_round": 3}, "layout": {"attn_implementation": "eager", **RECOMPUTE}},
        {"role": {**BUDGET, "sequence_length_round": 3}, "packed": True, "layout": {"reshard_after_forward": False}},
        {"micro_batch_size": 4, "packed": True, "layout": {"attn_implementation": "eager"}},
    ],
    ids=["padded", "packed", "padded-budget", "packed-budget", "packed-eager"],
)
def test_loss_and_gradients_are_those_of_transformers_one_sample_at_a_time(
    fields: dict[str, Any], size: int, gang: Gangs, tiny_moe: Path
) -> None:
    batch, case = make_batch(), fsdp2(tiny_moe, **fields)

    outcomes = gang(size).run(run_case, case, batch)

    reference = Reference(str(tiny_moe))
    difference = largest_difference(
        gradients(read_weights(tiny_moe), outcomes[0].weights), reference.gradients(batch, case.config(size))
    )
    print(f"gradients off by {difference:.1e}")
    assert difference < 1e-6
    loss = reference.loss(batch, case.config(size), replay=True).item()
    assert outcomes[0].metrics["actor/loss"] == pytest.approx(loss, abs=1e-6)
    assert all(outcome.at_rest for outcome in outcomes)
    counts = outcomes[0].train_counts
    assert counts.trainable == counts.trainable_replayed == batch.loss_mask_N.sum() * LAYERS
    assert counts.missing == 0


@pytest.mark.parametrize("name", TINY_MODELS)
def test_every_architecture(name: str, gang: Gangs, models: dict[str, Path]) -> None:
    batch = make_batch(checkpoint=models[name])
    case = fsdp2(models[name], packed=True, layout=RECOMPUTE)

    outcomes = gang(2).run(run_case, case, batch)

    wanted = Reference(str(models[name])).gradients(batch, case.config(2))
    difference = largest_difference(gradients(read_weights(models[name]), outcomes[0].weights), wanted)
    print(f"{name}: gradients off by {difference:.1e}")
    assert difference < 1e-6
    trained = batch.loss_mask_N.sum() * len(read_facts(models[name]).moe_layers)
    assert outcomes[0].train_counts.trainable_replayed == trained


def test_an_output_that_is_tied_to_the_embedding(gang: Gangs, tmp_path: Path) -> None:
    checkpoint = make_tiny_checkpoint(tmp_path, seed=1, tie_word_embeddings=True)
    batch, case = make_batch(), fsdp2(checkpoint, layout=RECOMPUTE)

    outcome = gang(2).run(run_case, case, batch)[0]

    wanted = Reference(str(checkpoint)).gradients(batch, case.config(2))
    assert "lm_head.weight" not in outcome.weights
    assert largest_difference(gradients(read_weights(checkpoint), outcome.weights), wanted) < 1e-6


@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize("name", ["qwen3_moe", "deepseek_v3"])
def test_megatron_gives_the_same_loss_and_gradients(name: str, size: int, gang: Gangs, models: dict[str, Path]) -> None:
    batch = make_batch(checkpoint=models[name])
    case = fsdp2(models[name], packed=True)
    before = read_weights(models[name])

    ours, theirs = (gang(size).run(run_case, c, batch)[0] for c in (case, replace(case, engine="megatron")))

    difference = largest_difference(gradients(before, ours.weights), gradients(before, theirs.weights))
    print(f"{name}: gradients off by {difference:.1e}")
    assert difference < 1e-5
    assert ours.metrics.keys() == theirs.metrics.keys()
    assert ours.metrics == pytest.approx(theirs.metrics, rel=1e-5, abs=1e-6)
    assert ours.train_counts == theirs.train_counts


def test_clipped_and_decayed_steps_are_megatrons(gang: Gangs, tiny_moe: Path) -> None:
    """Make two optimizer steps under warm-up: schedule, clipping, weight decay and its exceptions."""
    training = {"learning_rate": 1e-2, "weight_decay": 0.1, "max_grad_norm": 0.1, "warmup_steps": 1}
    training |= {"adam_epsilon": 1e-3, "lr_scheduler_type": "cosine"}
    case = fsdp2(tiny_moe, mini_batches=2, training=training, options={"ppo_epochs": 2})
    batch = make_batch()

    ours, theirs = (gang(2).run(run_case, c, batch)[0] for c in (case, replace(case, engine="megatron")))

    assert ours.metrics["actor_train/optimizer_steps"] == 4
    assert ours.metrics["actor/lr"] == theirs.metrics["actor/lr"] > 0
    assert largest_difference(ours.weights, theirs.weights) < 1e-5
    assert largest_difference(ours.weights, read_weights(tiny_moe)) > 1e-2


# Log-probabilities


@pytest.mark.parametrize("size", [1, 2])
def test_log_probs_of_samples_that_are_packed_or_padded(size: int, gang: Gangs, tiny_moe: Path) -> None:
    """Include samples of one token: each is computed as if alone, and the ranks' numbers of samples differ."""
    batch = _with_lengths(make_batch(), [1, 7, 1, 1, 12, 2, 5, 3])
    reference = Reference(str(tiny_moe))
    with torch.no_grad():
        wanted = [values.numpy() for values in reference.tokens(batch, replay=True)]
    live = reference.live_routes(batch, replay=True)
    pairs = list(zip(live, batch.routes, strict=True))
    agreed = sum(int((np.sort(a.ids_MRK) == np.sort(b.ids_MRK)).all(-1).sum()) for a, b in pairs)
    chosen = [np.concatenate([r.ids_MRK for r in routes], axis=1) for routes in (batch.routes, live)]
    for packed in (False, True):
        for attention in ("sdpa", "eager"):
            for role in ({}, {"max_tokens_per_microbatch_in_infer": 20, "use_dynamic_batching_in_infer": True}):
                case = fsdp2(tiny_moe, packed=packed, layout={"attn_implementation": attention}, role=role)
                case = replace(case, infer_batch_size=None if role else 3)
                for samples, found, entropies, counts, load in gang(size).run(_log_probs, case, batch):
                    inputs = batch.inputs_of(samples)
                    assert np.abs(found - wanted[0][inputs]).max() < 1e-5
                    assert np.abs(entropies - wanted[1][inputs]).max() < 1e-5
                    assert (counts.compared, counts.agreed) == (len(batch.input_ids_N) * LAYERS, agreed)
                    assert_load(load, chosen)


def _with_lengths(batch: Batch, lengths: list[int]) -> Batch:
    """Return the batch with each sample cut to at most the given length."""
    short = np.minimum(batch.lengths_n, lengths)
    keep = np.concatenate([start + np.arange(n) for start, n in zip(batch.offsets, short, strict=False)])
    arrays = {name: values[keep] for name, values in vars(batch).items() if name.endswith("_N") and values is not None}
    routes = tuple(RoutedExperts(r.ids_MRK[:, :n]) for r, n in zip(batch.routes, short, strict=True))
    return replace(batch, lengths_n=short, routes=routes, **arrays)


def _log_probs(process: ProcessInfo, case: Case, batch: Batch) -> tuple[Any, ...]:
    strategy = open_strategy(process, case)
    first = SAMPLES if process.world_size == 1 else 2  # uneven: one rank runs micro-batches that do not count
    samples = np.arange(first) if process.rank == 0 else np.arange(first, SAMPLES)
    result = strategy.compute_log_probs(batch.select(samples))
    assert at_rest(strategy) and strategy.returns_results
    strategy.close()
    return samples, result.log_probs_N, result.entropy_N, result.replay, result.load


def test_the_reference_routes_by_itself(gang: Gangs, tiny_moe: Path) -> None:
    batch = make_batch()
    case = fsdp2(tiny_moe, options={"use_kl_loss": True})
    with torch.no_grad():
        wanted = Reference(str(tiny_moe)).tokens(batch, replay=False)[0].numpy()
    (found,) = gang(1).run(_reference_beside_actor, case, batch)
    assert np.abs(found - wanted).max() < 1e-5


def _reference_beside_actor(process: ProcessInfo, case: Case, batch: Batch) -> np.ndarray:
    actor, reference = open_strategy(process, case), open_strategy(process, case, "reference")
    assert reference.backend.model.routers[0].module is not actor.backend.model.routers[0].module
    actor.train_step(batch, step=1)
    result = reference.compute_log_probs(batch)
    assert result.replay is None
    actor.close()
    reference.close()
    return result.log_probs_N


# Weights


@pytest.mark.parametrize("name", TINY_MODELS)
def test_exported_weights_are_the_checkpoints(name: str, gang: Gangs, models: dict[str, Path], tmp_path: Path) -> None:
    """Compare names and bits with the file; transformers reads the saved checkpoint back to the original tensors."""
    from transformers import AutoModelForCausalLM

    for dtype in ("fp32", "bf16"):
        saved = tmp_path / dtype
        case = fsdp2(models[name], dtype=dtype, mode="disable", layout={"reshard_after_forward": False})
        answers = gang(2).run(_export_and_save, case, make_batch(), saved)
        assert answers[0] == answers[1]
        before, after = (read_weights(path) for path in (models[name], saved))
        if dtype == "bf16":
            bias = "e_score_correction_bias"
            before = {n: w if bias in n else torch.from_numpy(w).bfloat16().float().numpy() for n, w in before.items()}
        assert set(answers[0]) == set(before)
        assert {d for n, d in answers[0].items() if "bias" not in n} == {
            torch.float32 if dtype == "fp32" else torch.bfloat16
        }
        assert largest_difference(before, after) == 0
    whole = [
        AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32) for path in (models[name], tmp_path / "fp32")
    ]
    first, second = (dict(model.state_dict()) for model in whole)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key], second[key]) for key in first)
    assert (tmp_path / "fp32" / "tokenizer.json").is_file()


def _export_and_save(process: ProcessInfo, case: Case, batch: Batch, path: Path) -> dict[str, torch.dtype]:
    strategy = open_strategy(process, case)
    strategy.compute_log_probs(shard(batch, process.rank, process.world_size))  # gathers weights, and frees them
    found = {name: tensor.dtype for name, tensor in strategy.export_weights()}
    strategy.save_hf(path)
    strategy.close()
    return found


def test_bf16_steps_on_fp32_masters(gang: Gangs, tiny_moe: Path) -> None:
    """Make steps too small for bf16: each moves the masters; repeated, they move the exported weights."""
    case = fsdp2(tiny_moe, dtype="bf16", layout=RECOMPUTE, training={"learning_rate": 2e-5, "max_grad_norm": 0.0})
    single = fsdp2(tiny_moe, layout=RECOMPUTE)
    batch = make_batch()
    for master, share, loss in gang(2).run(_bf16_steps, case, batch):
        assert master is torch.float32
        assert share[0] < 0.2 < share[1]
        exact = gang(2).run(run_case, single, batch)[0].metrics["actor/loss"]
        assert loss == pytest.approx(exact, abs=0.02)


def test_bf16_gradients_are_summed_over_ranks_in_fp32(gang: Gangs, tiny_moe: Path) -> None:
    """Sum one micro-batch of each rank: sums of two bf16 numbers, not all of them representable in bf16."""
    case = fsdp2(tiny_moe, dtype="bf16", micro_batch_size=4)
    for found in gang(2).run(raw_gradients, case, make_batch()):
        head = torch.from_numpy(found["lm_head.weight"])
        assert (head != head.bfloat16().float()).float().mean() > 0.1


def _bf16_steps(process: ProcessInfo, case: Case, batch: Batch) -> tuple[torch.dtype, list[float], float]:
    """Return the masters' dtype, shares of moved lm_head entries after one and eight steps, and the first loss."""
    strategy = open_strategy(process, case)
    part = shard(batch, process.rank, process.world_size)
    seen = []
    lm_head = strategy.backend.model.module.lm_head
    hook = lm_head.register_forward_hook(lambda m, x, y: seen.append((x[0].dtype, y.dtype)))
    head = dict(exported(strategy))["lm_head.weight"]
    losses, shares = [], []
    for step in range(1, 9):
        losses.append(strategy.train_step(part, step=step).metrics["actor/loss"])
        shares.append(float((dict(exported(strategy))["lm_head.weight"] != head).mean()))
    assert set(seen) == {(torch.bfloat16, torch.bfloat16)}
    hook.remove()
    dtype = next(strategy.backend.model.module.parameters()).dtype
    strategy.close()
    return dtype, [shares[0], shares[-1]], losses[0]
