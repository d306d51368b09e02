"""Trajectories to training form and back."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from roll_r3.batch.batch import Batch
from roll_r3.batch.grouping import assign_to_ranks, fixed_size, shuffled_mini_batches
from roll_r3.batch.routes import RoutedExperts, route_dtype
from roll_r3.batch.trajectory import Trajectory
from roll_r3.errors import RouteError


def trajectory(name: str, prompt: list[int], response: list[int], routes: bool = True) -> Trajectory:
    rows = len(prompt) + len(response) - 1
    ids = np.arange(2 * rows * 2, dtype=np.uint8).reshape(2, rows, 2)
    return Trajectory.one_turn(
        name,
        "group",
        prompt_ids=prompt,
        response_ids=response,
        log_probs=-np.arange(1, len(response) + 1),
        version=1,
        finish_reason="stop",
        routes=RoutedExperts(ids) if routes else None,
    )


@pytest.fixture
def batch() -> Batch:
    return Batch.from_trajectories([trajectory("a", [10, 11, 12], [13, 14]), trajectory("b", [20], [21, 22, 23])])


def test_inputs_labels_and_masks_line_up(batch):
    assert batch.lengths_n.tolist() == [4, 3]
    assert batch.input_ids_N.tolist() == [10, 11, 12, 13, 20, 21, 22]
    assert batch.labels_N.tolist() == [11, 12, 13, 14, 21, 22, 23]
    assert batch.loss_mask_N.tolist() == [False, False, True, True, True, True, True]
    assert batch.rollout_log_probs_N.tolist() == [0, 0, -1, -2, -1, -2, -3]
    assert [r.num_rows for r in batch.routes] == [4, 3], "one row per input"


def test_a_selection_is_the_samples_alone(batch):
    picked = batch.select([1, 0, 1])
    assert picked.sample_ids == ("b", "a", "b")
    assert picked.input_ids_N.tolist() == [20, 21, 22, 10, 11, 12, 13, 20, 21, 22]
    assert picked.routes[0] is batch.routes[1]
    assert picked.advantages_N is None


def test_fillers_train_on_nothing(batch):
    grown = batch.filled_up(4)
    assert grown.num_samples == 4
    assert grown.loss_mask_N.sum() == batch.loss_mask_N.sum()
    assert grown.lengths_n.tolist() == [4, 3, 3, 3], "copies of the shortest"
    assert len(set(grown.sample_ids)) == 4
    assert batch.filled_up(2) is batch


def test_routes_of_some_samples_only_are_refused():
    with pytest.raises(ValueError, match="1 of 2 trajectories carry no routes"):
        Batch.from_trajectories([trajectory("a", [1], [2]), trajectory("b", [1], [2], routes=False)])


def test_sums_per_sample(batch):
    assert batch.sum_per_sample(batch.loss_mask_N).tolist() == [2, 3]
    assert batch.per_sample(np.array([5, 6])).tolist() == [5] * 4 + [6] * 3


@settings(max_examples=300, deadline=None)
@given(st.lists(st.integers(1, 50), min_size=1, max_size=12), st.integers(1, 4))
def test_ranks_get_as_many_samples_and_each_once(lens, ranks):
    lens = np.array(lens * ranks)
    shards = assign_to_ranks(lens, ranks)
    assert {len(s) for s in shards} == {len(lens) // ranks}
    assert sorted(np.concatenate(shards).tolist()) == list(range(len(lens)))


def test_token_counts_of_ranks_are_even():
    shards = assign_to_ranks(np.array([100, 1, 1, 1, 100, 1, 1, 1]), 2)
    assert [[100, 1, 1, 1][i % 4] for i in shards[0]].count(100) == 1


def test_uneven_samples_are_refused():
    with pytest.raises(ValueError, match="3 samples do not divide over 2"):
        assign_to_ranks(np.array([1, 1, 1]), 2)


def test_mini_batches_are_one_shuffled_pass_that_the_seed_decides():
    first = shuffled_mini_batches(12, 4, (0, 1))
    assert sorted(np.concatenate(first).tolist()) == list(range(12))
    assert all((a == b).all() for a, b in zip(first, shuffled_mini_batches(12, 4, (0, 1)), strict=True))
    other = shuffled_mini_batches(12, 4, (0, 2))
    assert any((a != b).any() for a, b in zip(first, other, strict=True))
    with pytest.raises(ValueError, match="do not divide"):
        shuffled_mini_batches(10, 4, (0,))
    assert [m.tolist() for m in fixed_size(5, 2)] == [[0, 1], [2, 3], [4]]


@pytest.mark.parametrize(("experts", "dtype"), [(2, np.uint8), (256, np.uint8), (257, np.uint16), (65536, np.uint16)])
def test_the_model_decides_the_dtype(experts, dtype):
    assert route_dtype(experts) == dtype


def test_routes_know_their_shape():
    known = np.array([True, False, True])
    routes = RoutedExperts(np.zeros((4, 3, 2), np.uint16), known)
    assert (routes.num_layers, routes.num_rows, routes.top_k) == (4, 3, 2)
    assert routes.nbytes == 4 * 3 * 2 * 2 + 3
    with pytest.raises(RouteError, match="uint8 or uint16"):
        RoutedExperts(np.zeros((4, 3, 2), np.int32))
    with pytest.raises(RouteError, match="known_R"):
        RoutedExperts(np.zeros((4, 3, 2), np.uint8), known[:2])
    with pytest.raises(RouteError, match="65536"):
        route_dtype(1 << 17)
