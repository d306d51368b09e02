"""Micro-batches of a shard: their number and width under each rule of a backend."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import pytest
import torch

from roll_r3.batch.batch import Batch
from roll_r3.batch.data_parallel import DataParallel
from roll_r3.batch.token_map import Layout
from roll_r3.trainers.cutting import CutRules, cut_shard


@dataclass(frozen=True)
class Others(DataParallel):
    """Data-parallel ranks; another rank always has the larger number."""

    largest: int = 0
    calls: list[str] = field(default_factory=list)

    def reduce(self, values: torch.Tensor, operation: str = "sum") -> None:
        self.calls.append(operation)
        values.clamp_(min=self.largest)


def _batch(*lengths: int) -> Batch:
    total = sum(lengths)
    return Batch(
        sample_ids=tuple(f"s{i}" for i in range(len(lengths))),
        lengths_n=np.array(lengths),
        input_ids_N=np.arange(total),
        labels_N=np.arange(total),
        loss_mask_N=np.ones(total, bool),
        rollout_log_probs_N=np.zeros(total, np.float32),
    )


def _others(largest: int) -> Others:
    return Others(0, 2, torch.device("cpu"), largest=largest)


@pytest.mark.parametrize(
    ("rules", "budget", "number", "asked"),
    [
        (CutRules(Layout()), None, 3, []),
        (CutRules(Layout(), multiple=2), None, 4, []),
        (CutRules(Layout(), always_in_step=True), None, 5, ["max"]),
        (CutRules(Layout(), multiple=2, always_in_step=True), None, 6, ["max"]),
        (CutRules(Layout()), 8, 5, ["max"]),
        (CutRules(Layout(), multiple=2), 8, 6, ["max"]),
        (CutRules(Layout(), same_width=True), None, 3, ["max"]),
    ],
)
def test_the_number_of_micro_batches_and_the_calls_to_other_ranks(
    rules: CutRules, budget: int | None, number: int, asked: list[str]
) -> None:
    others = _others(largest=5)
    found = cut_shard(_batch(4, 4, 4, 4, 4), rules, others, size=2, max_tokens=budget)
    assert len(found) == number
    assert others.calls == asked
    counted = [sample for micro in found if micro.counted for sample in micro.samples]
    assert sorted(counted) == list(range(5)), "every sample counts once"


def test_a_common_width_is_that_of_the_widest_rank() -> None:
    rules = CutRules(Layout(), same_width=True)
    found = cut_shard(_batch(3, 5), rules, _others(largest=9), size=1, max_tokens=None)
    assert [micro.tokens.slots_BS.shape for micro in found] == [(1, 9), (1, 9)]
