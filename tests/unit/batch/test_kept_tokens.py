"""Sets of kept tokens: rows as lists, in trajectories and batches, and on the ranks of a layout."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from roll_r3.batch.batch import Batch
from roll_r3.batch.kept_tokens import KeptTokens
from roll_r3.batch.micro_batch import MicroBatch
from roll_r3.batch.token_map import Layout, build_token_map
from roll_r3.batch.trajectory import Trajectory, Turn

SETS = st.lists(st.lists(st.integers(0, 99), max_size=4), max_size=6)


def lists(kept: KeptTokens) -> list[list[int]]:
    ends = np.cumsum(kept.counts_S)
    return [kept.ids_J[end - n : end].tolist() for n, end in zip(kept.counts_S, ends, strict=True)]


@given(SETS, SETS, st.data())
def test_rows_are_selected_joined_and_spread_like_lists(a: list, b: list, data: st.DataObject) -> None:
    joined = KeptTokens.concatenate([KeptTokens.from_lists(a), KeptTokens.from_lists(b)])
    rows = a + b
    assert lists(joined) == rows and joined.num_rows == len(rows)
    assert joined.nbytes == 4 * (len(rows) + sum(map(len, rows)))
    assert joined.row_of_id.tolist() == [i for i, row in enumerate(rows) for _ in row]
    chosen = data.draw(st.lists(st.integers(0, len(rows) - 1), max_size=8)) if rows else []
    assert lists(joined.select(np.array(chosen, np.int64))) == [rows[i] for i in chosen]
    gaps = data.draw(st.lists(st.integers(0, 2), min_size=len(rows), max_size=len(rows)))
    at = np.cumsum(np.array(gaps, np.int64) + 1) - 1
    spread = lists(joined.spread(at, int(at[-1]) + 3 if rows else 3))
    assert [spread[i] for i in at] == rows and sum(map(len, spread)) == sum(map(len, rows))


@pytest.mark.parametrize(
    ("counts", "ids", "why"),
    [
        (np.array([1], np.int64), np.array([1], np.int32), "counts_S must be an int32 vector"),
        (np.array([1], np.int32), np.array([[1]], np.int32), "ids_J must be an int32 vector"),
        (np.array([2], np.int32), np.array([1], np.int32), "do not add up to 1 ids"),
        (np.array([2, -1], np.int32), np.array([1], np.int32), "do not add up to 1 ids"),
    ],
)
def test_counts_that_are_not_those_of_the_ids(counts: np.ndarray, ids: np.ndarray, why: str) -> None:
    with pytest.raises(ValueError, match=why):
        KeptTokens(counts, ids)


def two_turns(name: str = "s") -> Trajectory:
    """Return 7 tokens, of which 2, 3 and 6 are sampled."""
    sampled_T = np.array([0, 0, 1, 1, 0, 0, 1], bool)
    return Trajectory(
        name,
        "g",
        np.arange(7, dtype=np.int32),
        sampled_T,
        np.where(sampled_T, -1, 0).astype(np.float32),
        np.where(sampled_T, 0, -1).astype(np.int32),
        (Turn(2, 4, "length"), Turn(6, 7, "stop")),
        kept=KeptTokens.from_lists([[2, 9], [3], [8, 6, 5]]),
    )


def test_a_batch_has_the_set_of_each_label_at_its_input() -> None:
    batch = Batch.from_trajectories([two_turns("a"), two_turns("b")])
    assert batch.kept is not None
    one = [[], [2, 9], [3], [], [], [8, 6, 5]]
    assert lists(batch.kept) == one + one
    assert [label in row for label, row in zip(batch.labels_N, one + one, strict=True)] == batch.loss_mask_N.tolist()
    kept = batch.select([1]).filled_up(3).kept
    assert kept is not None and lists(kept) == one * 3


def test_a_trajectory_needs_a_set_for_each_sampled_token() -> None:
    for sets in ([[2], [3]], [[2], [], [6]]):
        with pytest.raises(ValueError, match="kept tokens must be 3 non-empty sets, one per sampled token, got 2"):
            replace(two_turns(), kept=KeptTokens.from_lists(sets))


def test_all_trajectories_have_sets_or_none_has() -> None:
    with pytest.raises(ValueError, match="1 of 2 trajectories carry no kept tokens"):
        Batch.from_trajectories([two_turns(), replace(two_turns(), kept=None)])
    assert Batch.from_trajectories([replace(two_turns(), kept=None)]).kept is None


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("cp_size", [1, 2])
def test_the_ranks_of_a_layout_hold_the_set_of_each_of_their_tokens(cp_size: int, packed: bool) -> None:
    batch = Batch.from_trajectories([two_turns("a"), two_turns("b")])
    assert batch.kept is not None
    rows, seen = lists(batch.kept), 0
    for cp_rank in range(cp_size):
        tokens = build_token_map(batch.lengths_n, Layout(packed=packed, cp_size=cp_size, cp_rank=cp_rank))
        micro = MicroBatch(batch, np.arange(2), tokens)
        kept = micro.kept(torch.device("cpu"))
        assert kept is not None
        for place, slot in enumerate(tokens.slots_BS.reshape(-1)):
            wanted = rows[slot] if slot >= 0 else []
            assert kept.ids_J[kept.slots_J == place].tolist() == wanted
            assert int(kept.sizes_BS.view(-1)[place]) == len(wanted)
            seen += len(wanted)
    assert seen == len(batch.kept.ids_J)
