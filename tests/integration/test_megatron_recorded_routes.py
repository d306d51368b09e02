"""R2 for a sample trained on another data-parallel rank than the recording one: its rows follow it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from distributed import Gang
from megatron_cases import (
    FULL_RECOMPUTE,
    LAYERS,
    SAMPLES,
    TOP_K,
    Case,
    Weights,
    exported,
    largest_difference,
    make_batch,
)

from roll_r3.batch.batch import Batch
from roll_r3.errors import ReplayError
from roll_r3.strategies.base import ProcessInfo

pytestmark = pytest.mark.integration
Gangs = Callable[[int], Gang]
Shards = Sequence[Sequence[int]]

STRIDED: Shards = ([0, 2, 4, 6], [1, 3, 5, 7])
SWAPPED: Shards = STRIDED[::-1]
ONE_EACH: Shards = ([0, 2, 4, 1], [6, 3, 5, 7])
ONE_WAY: Shards = ([0, 2, 4, 6], [1, 3, 5, 0])
TWO_TO_ONE: Shards = ([0, 1, 2, 3], [4, 5, 6, 7])


@pytest.mark.parametrize(
    ("size", "layout", "trained"),
    [
        (2, {}, SWAPPED),
        (2, FULL_RECOMPUTE, ONE_EACH),
        (2, {}, ONE_WAY),
        (2, {}, STRIDED),
        (4, {"pipeline_model_parallel_size": 2, **FULL_RECOMPUTE}, TWO_TO_ONE),
    ],
)
def test_rows_follow_their_samples(size: int, layout: dict, trained: Shards, gang: Gangs, tiny_moe: Path) -> None:
    batch = replace(make_batch(), routes=None)
    case = Case(str(tiny_moe), layout, "R2", infer_batch_size=1)

    at_home = gang(size).run(_record_and_train, case, batch, trained, trained)
    moved = gang(size).run(_record_and_train, case, batch, STRIDED, trained)

    assert largest_difference(moved[0][0], at_home[0][0]) == 0
    assert [sent for _, sent, _ in at_home] == [[]] * size
    local_layers = LAYERS // (size // 2)
    for _, sent, rank in moved:
        others = [i for other in (0, 1) for i in trained[other] if i not in STRIDED[other]]
        row_bytes = sum(int(batch.lengths_n[i]) for i in others if i in STRIDED[rank]) * local_layers * TOP_K
        assert sent == ([row_bytes] if others else []), "once for two steps"


def _record_and_train(
    process: ProcessInfo, case: Case, batch: Batch, recorded_on: Shards, trained_on: Shards
) -> tuple[Weights, list[int], int]:
    """Return weights after two steps on one recording, bytes of rows in each exchange, and the data-parallel rank."""
    import torch.distributed as dist

    from roll_r3.replay import recorded

    sent = []

    def counted(output: Any, input: Any, *args: Any, **kwargs: Any) -> Any:
        sent.append(input.numel() * input.element_size())
        return dist.all_to_all_single(output, input, *args, **kwargs)

    strategy = _strategy(process, case)
    rank = strategy.data_parallel_rank
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(recorded, "dist", SimpleNamespace(**{**vars(dist), "all_to_all_single": counted}))
        strategy.compute_log_probs(batch.select(recorded_on[rank]))
        part = batch.select(trained_on[rank])
        for step in (1, 2):
            counts = strategy.train_step(part, step=step).replay
            assert counts.trainable_replayed == counts.trainable > 0
    weights = dict(exported(strategy))
    strategy.close()
    return weights, sent, rank


def test_a_sample_that_no_rank_recorded_is_refused_everywhere(gang: Gangs, tiny_moe: Path) -> None:
    answers = gang(2).run(_refused, Case(str(tiny_moe), mode="R2"), replace(make_batch(), routes=None))
    assert answers[0] == answers[1]
    assert "1 of 8 samples were not in it (the first is nowhere)" in answers[0]


def _refused(process: ProcessInfo, case: Case, batch: Batch) -> str:
    strategy = _strategy(process, case)
    part = batch.select(STRIDED[strategy.data_parallel_rank])
    strategy.compute_log_probs(part)
    swapped = batch.select(SWAPPED[strategy.data_parallel_rank])
    if strategy.data_parallel_rank == 0:
        swapped = replace(swapped, sample_ids=("nowhere", *swapped.sample_ids[1:]))
    with pytest.raises(ReplayError) as caught:
        strategy.train_step(swapped, step=1)
    strategy.train_step(part, step=1)
    strategy.close()
    return str(caught.value)


def _strategy(process: ProcessInfo, case: Case) -> Any:
    from roll_r3.trainers.megatron.strategy import MegatronTrain

    assert SAMPLES == 8
    strategy = MegatronTrain(case.view(process.world_size // case.model_parallel_size), process)
    strategy.initialize()
    return strategy
