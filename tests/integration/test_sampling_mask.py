"""Log-probabilities over kept tokens on real trainers, in every kind of layout, against a dense mask."""

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
    VOCAB,
    Case,
    Reference,
    gradients,
    largest_difference,
    make_batch,
    open_strategy,
    read_weights,
    run_case,
    shard,
)

from roll_r3.batch.batch import Batch
from roll_r3.batch.kept_tokens import KeptTokens
from roll_r3.strategies.base import ProcessInfo

pytestmark = pytest.mark.integration
Gangs = Callable[[int], Gang]

TP2 = {"tensor_model_parallel_size": 2}
CP2 = {"context_parallel_size": 2}
PIPELINE = {**INTERLEAVED, **FULL_RECOMPUTE}
EVERY_TERM = {"use_kl_loss": True, "kl_loss_coef": 0.3, "entropy_loss_coef": 0.1}

CASES = {
    "fsdp2 padded": (2, "fsdp2", {}, False),
    "fsdp2 packed": (2, "fsdp2", {"recompute": True}, True),
    "megatron padded": (1, "megatron", {}, False),
    "megatron DP2 packed": (2, "megatron", {}, True),
    "megatron TP2": (2, "megatron", TP2, False),
    "megatron TP2 packed": (2, "megatron", TP2, True),
    "megatron CP2": (2, "megatron", CP2, False),
    "megatron CP2 packed": (2, "megatron", CP2, True),
    "megatron EP2": (2, "megatron", {"expert_model_parallel_size": 2}, False),
    "megatron PP2 VPP2": (2, "megatron", PIPELINE, False),
}


def with_sets(batch: Batch, *, whole: bool = False) -> Batch:
    """Give every trained label a set; two in three lie in one half of the vocabulary, so on one rank of two."""
    rng = np.random.default_rng(5)
    sets: list[list[int]] = []
    for trained, label in zip(batch.loss_mask_N, batch.labels_N.tolist(), strict=True):
        half = range(VOCAB // 2) if label < VOCAB // 2 else range(VOCAB // 2, VOCAB)
        among = list(half if rng.random() < 2 / 3 and not whole else range(VOCAB))
        others = rng.permutation([token for token in among if token != label])
        size = len(others) if whole else rng.integers(0, 40)
        sets.append(rng.permutation([label, *others[:size]]).tolist() if trained else [])
    return replace(batch, kept=KeptTokens.from_lists(sets))


@pytest.mark.parametrize("name", CASES)
def test_log_probs_entropies_and_gradients_with_routes_replayed(name: str, gang: Gangs, tiny_moe: Path) -> None:
    size, engine, layout, packed = CASES[name]
    batch = with_sets(make_batch())
    case = Case(
        str(tiny_moe), layout, "R3", packed, micro_batch_size=1, engine=engine, options=EVERY_TERM, log_probs_first=True
    )
    ranks = size // case.model_parallel_size

    outcomes = gang(size).run(run_case, case, batch)

    reference = Reference(str(tiny_moe))
    for outcome in outcomes:
        if outcome.log_probs is not None:
            part = shard(batch, outcome.dp_rank, ranks)
            wanted = reference.tokens(part, replay=True)
            for found, values in zip((outcome.log_probs, outcome.entropy), wanted, strict=True):
                assert np.abs(found - values.detach().numpy()).max() < 1e-5
    found = gradients(read_weights(tiny_moe), outcomes[0].weights)
    difference = largest_difference(found, reference.gradients(batch, case.config(ranks)))
    print(f"{name}: gradients off by {difference:.1e}")
    assert difference < 3e-6
    counts, metrics = outcomes[0].train_counts, outcomes[0].metrics
    assert counts.trainable == counts.trainable_replayed == batch.loss_mask_N.sum() * LAYERS
    assert all(outcome.metrics == metrics for outcome in outcomes)
    assert metrics["sampling_mask/coverage"] == 1
    assert metrics["sampling_mask/mean_size"] == pytest.approx(batch.kept.counts_S[batch.loss_mask_N].mean())
    whole = reference.tokens(replace(batch, kept=None), replay=True)[0] - reference.tokens(batch, replay=True)[0]
    mass = whole.detach().exp().numpy()[batch.loss_mask_N].mean()
    assert metrics["sampling_mask/mass"] == pytest.approx(mass, abs=1e-6)


@pytest.mark.parametrize(("engine", "layout"), [("fsdp2", {}), ("megatron", TP2)])
def test_the_whole_vocabulary_as_a_set_is_no_set(
    engine: str, layout: dict[str, Any], gang: Gangs, tiny_moe: Path
) -> None:
    batch = make_batch()
    case = Case(str(tiny_moe), layout, engine=engine, options=EVERY_TERM)
    weights = [gang(2).run(run_case, case, one)[0].weights for one in (batch, with_sets(batch, whole=True))]
    assert largest_difference(*weights) < 1e-6


@pytest.mark.parametrize(("engine", "layout"), [("fsdp2", {}), ("megatron", CP2)])
def test_the_update_finds_the_old_log_probs_to_the_bit(
    engine: str, layout: dict[str, Any], gang: Gangs, tiny_moe: Path
) -> None:
    """In bf16, with the sets of a reference role that sees the same batch."""
    batch = replace(with_sets(make_batch()), old_log_probs_N=None)
    case = Case(str(tiny_moe), layout, "disable", True, "bf16", infer_batch_size=2, engine=engine, options=EVERY_TERM)
    for before, after, reference in gang(2).run(_before_and_in_the_update, case, batch):
        assert np.array_equal(before, after)
        assert np.array_equal(before, reference), "the actor before its first update"


def _before_and_in_the_update(process: ProcessInfo, case: Case, batch: Batch) -> tuple[Any, Any, Any]:
    strategy, frozen = open_strategy(process, case), open_strategy(process, case, "reference")
    part = shard(batch, strategy.data_parallel_rank, strategy.data_parallel_size)
    reference = frozen.compute_log_probs(part).log_probs_N
    before = strategy.compute_log_probs(part).log_probs_N
    after = strategy.train_step(part, step=1).log_probs_N
    strategy.close()
    frozen.close()
    if before is None:
        return 0, 0, 0
    return before, after, reference
