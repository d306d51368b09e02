"""Load of the experts against a loop over tokens, and the figures of collapsed and of balanced routers."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from roll_r3.replay.choice_counts import at_model_layers, count_choices, new_counts
from roll_r3.replay.expert_load import ExpertLoad, load_metrics
from roll_r3.tracking.names import declared_order


def test_choices_are_counted_where_they_count() -> None:
    rng = np.random.default_rng(0)
    ids = rng.random((50, 6)).argsort(-1)[:, :2]
    counted = rng.random(50) < 0.6
    ids[~counted] = rng.integers(-(2**60), 2**60, ids[~counted].shape)  # rows unknown to the engine
    counts = new_counts(6, torch.device("cpu"))
    for part in (slice(0, 20), slice(20, 50)):
        count_choices(counts[1], torch.from_numpy(ids[part]), torch.from_numpy(counted[part]))
    wanted = [0] * 6
    for row, counts_here in zip(ids.tolist(), counted.tolist(), strict=True):
        for expert in row if counts_here else ():
            wanted[expert] += 1
    assert counts.tolist() == [[0] * 6, wanted]


def test_schedules_and_ranks_fill_their_layers() -> None:
    ones, cpu = torch.ones(2, 4, dtype=torch.int64), torch.device("cpu")
    total = at_model_layers([{3: ones}, {3: ones, 5: 2 * ones}], (1, 3, 5), 4, cpu)
    assert total[..., 0].tolist() == [[0, 2, 2]] * 2


def test_a_collapsed_layer_is_named() -> None:
    """Layer 3 sends its tokens to 2 of 4 experts, layer 1 is balanced."""
    live = [[4, 4, 4, 4], [8, 0, 8, 0], [2, 4, 4, 6]]
    m = load_metrics(ExpertLoad((1, 3, 5), np.array([np.zeros((3, 4)), live]).astype(np.int64)))
    assert not declared_order(m)[1]
    assert not [name for name in m if name.startswith("expert_load/rollout")]
    of = {name.removeprefix("expert_load/live/"): figure for name, figure in m.items()}
    assert of["max_share_worst"] == 0.5
    assert of["max_share"] == pytest.approx((0.25 + 0.5 + 6 / 16) / 3)
    assert (of["min_share_worst"], of["min_share"]) == (0, pytest.approx((0.25 + 0 + 2 / 16) / 3))
    assert (of["worst_layer"], of["entropy_worst"], of["layer_3"]) == (3, 0.5, 0.5)
    assert of["layer_1"] == pytest.approx(1)
    shares = np.array(live[2]) / 16
    assert of["layer_5"] == pytest.approx(-(shares * np.log(shares)).sum() / np.log(4))
    assert of["entropy"] == pytest.approx((1 + 0.5 + of["layer_5"]) / 3)
