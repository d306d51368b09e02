"""One optimizer step with R3 routes, in every small layout, against transformers with forced routers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from distributed import Gang
from megatron_cases import (
    FULL_RECOMPUTE,
    INTERLEAVED,
    LAYERS,
    SAMPLES,
    Case,
    Reference,
    assert_copies_agree,
    gradients,
    largest_difference,
    make_batch,
    make_model,
    read_weights,
    run_case,
    shard,
)

from roll_r3.batch.grouping import shuffled_mini_batches

pytestmark = pytest.mark.integration
Gangs = Callable[[int], Gang]

EVERY_TERM = {"use_kl_loss": True, "kl_loss_coef": 0.1, "entropy_loss_coef": 0.05}
TP2 = {"tensor_model_parallel_size": 2}
PP2 = {"pipeline_model_parallel_size": 2}
CP2 = {"context_parallel_size": 2}
EP2 = {"expert_model_parallel_size": 2}
BLOCK = {"recompute_granularity": "full", "recompute_method": "block", "recompute_num_layers": 1}
SELECTIVE = {"recompute_granularity": "selective", "recompute_modules": ("moe",)}

LAYOUTS = {
    "one process": (1, {}, False),
    "one process, packed": (1, {}, True),
    "recompute uniform": (1, FULL_RECOMPUTE, False),
    "recompute block": (1, {**BLOCK, "recompute_num_layers": 2}, False),
    "recompute moe": (1, SELECTIVE, False),
    "DP2 distributed optimizer, overlapped": (
        2,
        {"use_distributed_optimizer": True, "overlap_grad_reduce": True},
        False,
    ),
    "DP2": (2, {}, False),
    "TP2": (2, {**TP2, **FULL_RECOMPUTE}, False),
    "TP2 packed": (2, TP2, True),
    "EP2": (2, {**EP2, **FULL_RECOMPUTE}, False),
    "EP2 allgather": (2, {**EP2, "moe_token_dispatcher_type": "allgather"}, False),
    "EP2 allgather packed": (2, {**EP2, "moe_token_dispatcher_type": "allgather"}, True),
    "TP2 EP2": (2, {**TP2, **EP2}, False),
    "CP2": (2, {**CP2, **FULL_RECOMPUTE}, False),
    "CP2 packed": (2, CP2, True),
    "CP2 EP2 packed": (2, {**CP2, **EP2}, True),
    "PP2": (2, {**PP2, **FULL_RECOMPUTE}, False),
    "PP2 without recompute, packed": (2, PP2, True),
    "PP2 uneven": (2, {**PP2, "num_layers_in_first_pipeline_stage": 1, "num_layers_in_last_pipeline_stage": 3}, False),
    "PP2 VPP2": (2, {**INTERLEAVED, **FULL_RECOMPUTE}, False),
    "PP2 VPP2 packed": (2, {**INTERLEAVED, **FULL_RECOMPUTE}, True),
    "PP2 VPP2 recompute block": (2, {**INTERLEAVED, **BLOCK}, False),
    "PP2 VPP2 recompute moe": (2, {**INTERLEAVED, **SELECTIVE}, False),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_gradients_equal_the_reference(name: str, gang: Gangs, tiny_moe: Path) -> None:
    size, layout, packed = LAYOUTS[name]
    case = Case(str(tiny_moe), layout, packed=packed, options=EVERY_TERM)
    batch = make_batch()

    outcomes = gang(size).run(run_case, case, batch)

    found = gradients(read_weights(tiny_moe), outcomes[0].weights)
    wanted = Reference(str(tiny_moe)).gradients(batch, case.config())
    difference = largest_difference(found, wanted)
    print(f"{name}: largest |gradient - reference| {difference:.1e}")
    assert difference < 1e-6
    assert_copies_agree(outcomes)
    counts = outcomes[0].train_counts
    assert counts.trainable == counts.trainable_replayed == batch.loss_mask_N.sum() * LAYERS
    assert counts.missing == 0
    assert all(outcome.train_counts == counts and outcome.metrics == outcomes[0].metrics for outcome in outcomes)


def test_the_pipeline_equals_one_process(gang: Gangs, tiny_moe: Path) -> None:
    batch = make_batch()
    one = Case(str(tiny_moe), options=EVERY_TERM)
    pipeline = replace(one, layout={**INTERLEAVED, **FULL_RECOMPUTE})

    alone = gang(1).run(run_case, one, batch)[0]
    together = gang(2).run(run_case, pipeline, batch)[0]

    before = read_weights(tiny_moe)
    assert largest_difference(gradients(before, alone.weights), gradients(before, together.weights)) < 1e-6
    assert together.metrics == pytest.approx(alone.metrics, rel=1e-5)


@pytest.mark.parametrize(
    ("layers", "layout"),
    [
        (5, {**PP2, "account_for_embedding_in_pipeline_split": True}),
        (5, {**PP2, "account_for_loss_in_pipeline_split": True}),
        (
            6,
            {
                **INTERLEAVED,
                "account_for_embedding_in_pipeline_split": True,
                "account_for_loss_in_pipeline_split": True,
                **FULL_RECOMPUTE,
            },
        ),
        (8, {**INTERLEAVED, "num_layers_in_first_pipeline_stage": 2}),
    ],
)
def test_layers_that_are_not_dealt_evenly(layers: int, layout: dict, gang: Gangs, tmp_path: Path) -> None:
    """Let the embedding or the loss take the place of a layer; interleave an uneven stage."""
    checkpoint = make_model(tmp_path, "qwen3_moe_mixed", num_hidden_layers=layers, mlp_only_layers=[0, 3])
    batch = make_batch(checkpoint=checkpoint)
    case = Case(str(checkpoint), layout)

    outcome = gang(2).run(run_case, case, batch)[0]

    found = gradients(read_weights(checkpoint), outcome.weights)
    assert largest_difference(found, Reference(str(checkpoint)).gradients(batch, case.config())) < 1e-6


@pytest.mark.parametrize("mode", ["seq-mean-token-mean", "seq-mean-token-sum-norm"])
def test_the_loss_does_not_depend_on_how_samples_are_cut(mode: str, gang: Gangs, tiny_moe: Path) -> None:
    batch = make_batch()
    case = Case(str(tiny_moe), options={"loss_agg_mode": mode})

    alone = gang(1).run(run_case, replace(case, micro_batch_size=8), batch)[0]
    spread = gang(2).run(run_case, replace(case, micro_batch_size=1, packed=True), batch)[0]

    before = read_weights(tiny_moe)
    assert largest_difference(gradients(before, alone.weights), gradients(before, spread.weights)) < 1e-6
    loss = Reference(str(tiny_moe)).loss(batch, case.config(), replay=True).item()
    assert [x.metrics["actor/loss"] for x in (alone, spread)] == pytest.approx([loss, loss], abs=1e-6)


ADAM = {"learning_rate": 1e-3, "adam_epsilon": 1e-3, "max_grad_norm": 0.5}


@pytest.mark.parametrize(
    ("size", "layout"),
    [
        (1, {}),
        (2, {"use_distributed_optimizer": True, **EP2}),
        (2, {**INTERLEAVED, **FULL_RECOMPUTE}),
        (2, {**TP2, "use_distributed_optimizer": True}),
    ],
)
def test_clipped_adam_steps_equal_the_reference(
    size: int, layout: dict[str, object], gang: Gangs, tiny_moe: Path
) -> None:
    batch = make_batch()
    case = Case(str(tiny_moe), layout, micro_batch_size=1, mini_batches=2, training=ADAM, options=EVERY_TERM)
    if INTERLEAVED.items() <= layout.items():
        case = replace(case, micro_batch_size=2)
    config = case.config()
    ranks = size // case.model_parallel_size

    outcome = gang(size).run(run_case, case, batch)[0]

    shards = [shard(batch, rank, ranks) for rank in range(ranks)]
    order = [
        shuffled_mini_batches(SAMPLES // ranks, SAMPLES // ranks // 2, (config.seed, 1, 0, r)) for r in range(ranks)
    ]
    number = {sample_id: i for i, sample_id in enumerate(batch.sample_ids)}
    steps = [
        batch.select(
            [number[s] for part, cuts in zip(shards, order, strict=True) for s in part.select(cuts[i]).sample_ids]
        )
        for i in range(2)
    ]
    wanted = Reference(str(tiny_moe)).train(steps, config)
    difference = largest_difference(outcome.weights, wanted)
    moved = largest_difference(read_weights(tiny_moe), wanted)
    print(f"{layout}: largest |weight - reference| {difference:.1e} after moves of up to {moved:.1e}")
    assert difference < 2e-6 < 1e-4 < moved
    assert outcome.metrics["actor_train/optimizer_steps"] == 2
    assert outcome.metrics["actor/lr"] == ADAM["learning_rate"]


def test_the_learning_rate_ends_with_the_run(gang: Gangs, tiny_moe: Path) -> None:
    """Make 10 steps x 2 epochs x 2 optimizer steps; the fourth is the last of the first step."""
    training = {"learning_rate": 1e-3, "lr_scheduler_type": "linear"}
    case = Case(str(tiny_moe), mini_batches=2, training=training, options={"ppo_epochs": 2})
    outcome = gang(1).run(run_case, case, make_batch())[0]
    assert outcome.metrics["actor/lr"] == pytest.approx(1e-3 * (1 - 3 / 40))


def test_padded_vocabulary_gets_no_probability(gang: Gangs, tmp_path: Path) -> None:
    """Split 261 tokens over two tensor-parallel ranks: one column is padding."""
    checkpoint = make_model(tmp_path, "qwen3_moe", vocab_size=261)
    batch = make_batch(vocab=261)
    case = Case(str(checkpoint), TP2, options=EVERY_TERM, log_probs_first=True)

    outcome = gang(2).run(run_case, case, batch)[0]

    reference = Reference(str(checkpoint))
    wanted = reference.gradients(batch, case.config())
    log_probs, entropies = (x.detach().numpy() for x in reference.tokens(batch, replay=True))
    assert np.abs(outcome.log_probs - log_probs).max() < 1e-5
    assert np.abs(outcome.entropy - entropies).max() < 1e-5
    assert largest_difference(gradients(read_weights(checkpoint), outcome.weights), wanted) < 1e-6


def test_bf16_trains_close_to_fp32(gang: Gangs, tiny_moe: Path) -> None:
    """Compare a step of bf16 weights with fp32 masters to an fp32 step, within bf16's rounding, also in a pipeline."""
    batch = make_batch()
    case = Case(str(tiny_moe), training={"learning_rate": 1e-4}, log_probs_first=True)

    exact = gang(1).run(run_case, case, batch)[0]
    alone = gang(1).run(run_case, replace(case, dtype="bf16"), batch)[0]
    layout = {**INTERLEAVED, **FULL_RECOMPUTE, "use_distributed_optimizer": True}
    together = gang(2).run(run_case, replace(case, dtype="bf16", layout=layout), batch)

    log_probs = next(outcome.log_probs for outcome in together if outcome.log_probs is not None)
    assert np.abs(alone.log_probs - exact.log_probs).max() < 0.2
    assert np.abs(alone.log_probs - log_probs).max() < 1e-5
    assert alone.metrics["actor_train/grad_norm"] == pytest.approx(exact.metrics["actor_train/grad_norm"], rel=0.05)
    assert together[0].metrics["actor_train/grad_norm"] == pytest.approx(
        alone.metrics["actor_train/grad_norm"], rel=1e-3
    )
    assert largest_difference(alone.weights, together[0].weights) < 1e-3
