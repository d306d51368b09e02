"""Slices of the distributed optimizer, read out of the rows they touch."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from roll_r3.platform import megatron_cpu

megatron_cpu.install()

from roll_r3.trainers.megatron.checkpoint import _landings  # noqa: E402
from roll_r3.trainers.megatron.optimizer import MOMENTS, Slot  # noqa: E402

SOME_GROUP: Any = object()
"""Stand-in for a group; these tests never call it."""


@pytest.mark.parametrize(
    ("shape", "begin", "size", "rows"),
    [
        ((5, 3), 4, 7, (1, 4)),
        ((5, 3), 0, 15, (0, 5)),
        ((5, 3), 3, 6, (1, 3)),
        ((5, 3), 7, 1, (2, 3)),
        ((5, 3), 14, 1, (4, 5)),
        ((7,), 2, 3, (2, 5)),
        ((2, 3, 4), 11, 2, (0, 2)),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_slice_takes_its_elements(shape, begin, size, rows, dtype):
    parameter = torch.nn.Parameter(torch.zeros(shape, dtype=dtype))
    state = {moment: torch.full((size,), -1.0) for moment in MOMENTS}
    slot = Slot(parameter, torch.full((size,), -1.0), state, begin, SOME_GROUP)
    landings = list(_landings(slot))
    assert [landing.kind for landing in landings] == ["weight", *MOMENTS][dtype is torch.float32 :]
    for number, landing in enumerate(landings):
        saved = torch.arange(parameter.numel(), dtype=torch.float32).view(shape) + 100 * number
        assert landing.first_row == rows[0]
        assert landing.rows.shape == (rows[1] - rows[0], *shape[1:])
        landing.rows.copy_(saved[slice(*rows)])
        landing.settle()
        assert landing.target.tolist() == saved.flatten()[begin : begin + size].tolist()


def test_what_no_checkpoint_holds_stays_as_it_is():
    """Rows of padding beyond the vocabulary are not read."""
    state = {moment: torch.arange(4.0) for moment in MOMENTS}
    slot = Slot(torch.nn.Parameter(torch.zeros(3, 3)), torch.zeros(4), state, 4, SOME_GROUP)
    for landing in _landings(slot):
        landing.settle()
        assert landing.target.tolist() == [0, 1, 2, 3]


def test_a_rank_without_a_slice_reads_nothing():
    assert list(_landings(Slot(torch.nn.Parameter(torch.zeros(3)), None, {}, group=SOME_GROUP))) == []
