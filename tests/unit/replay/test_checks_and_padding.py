"""Payload checks, one violation each; padding rows against a count of their load."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from roll_r3.errors import RouteError
from roll_r3.replay.checks import FEW_ROWS, check_log_probs, compact_routes
from roll_r3.replay.padding import padding_rows

MODEL = {"num_layers": 4, "moe_layers": (1, 3), "num_experts": 300, "top_k": 2}


def payload(rows: int = 5) -> np.ndarray:
    """Return int32 [rows, 4, 2] as sent by an engine: ids encode (layer, row), dense layers are zero."""
    ids = np.zeros((rows, 4, 2), np.int32)
    for layer in (1, 3):
        ids[:, layer, 0] = 40 * layer + np.arange(rows)
        ids[:, layer, 1] = 290 + layer
    return ids


def test_moe_layers_are_kept_layer_major():
    routes = compact_routes(payload(), num_rows=5, **MODEL)
    assert routes.ids_MRK.shape == (2, 5, 2)
    assert routes.ids_MRK.dtype == np.uint16, "300 experts do not fit a byte"
    assert routes.ids_MRK[0, :, 0].tolist() == [40, 41, 42, 43, 44]
    assert routes.ids_MRK[1, :, 1].tolist() == [293] * 5
    assert routes.ids_MRK.flags.c_contiguous


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda ids: ids[:-1], "shape"),
        (lambda ids: ids[:, :3], "shape"),
        (lambda ids: ids[..., :1], "shape"),
        (lambda ids: np.where(ids == 43, 300, ids), "300 experts"),
        (lambda ids: np.where(ids == 43, -1, ids), "300 experts"),
        (lambda ids: np.where(ids == 43, 291, ids), "twice"),
        (lambda ids: ids * (np.arange(4) != 3)[None, :, None], r"all zeros in MoE layers \[3\]"),
    ],
)
def test_a_broken_payload_is_refused(damage, message):
    with pytest.raises(RouteError, match=message):
        compact_routes(damage(payload()), num_rows=5, **MODEL)


def test_a_few_tokens_may_all_go_to_the_first_expert_where_each_goes_to_one():
    """Reject more rows of zeros as not recorded. With two choices a row of zeros names an expert twice anyway."""
    model = MODEL | {"top_k": 1}
    few = np.zeros((FEW_ROWS, model["num_layers"], 1), np.int32)
    assert not compact_routes(few, num_rows=FEW_ROWS, **model).ids_MRK.any()
    many = np.zeros((FEW_ROWS + 1, model["num_layers"], 1), np.int32)
    with pytest.raises(RouteError, match=r"all zeros in MoE layers .* or the router sent all 65 tokens to expert 0"):
        compact_routes(many, num_rows=FEW_ROWS + 1, **model)


@pytest.mark.parametrize(
    ("log_probs", "tokens"), [([-1.0, np.nan], 2), ([-1.0, -np.inf], 2), ([-1.0, 0.5], 2), ([-1.0], 2)]
)
def test_log_probs_must_be_log_probs(log_probs, tokens):
    with pytest.raises(RouteError):
        check_log_probs(np.array(log_probs), tokens)


@settings(max_examples=300, deadline=None)
@given(st.integers(0, 60), st.sampled_from([1, 2, 4]), st.integers(1, 8), st.data())
def test_padding_loads_ranks_and_experts_evenly(rows, ep, per_rank, data):
    experts = ep * per_rank
    top_k = data.draw(st.integers(1, experts))
    ids = padding_rows(rows, experts, top_k, ep_size=ep)
    assert all(len(set(row)) == top_k for row in ids.tolist())
    loads = torch.bincount(ids.reshape(-1), minlength=experts)
    assert loads.max() - loads.min() <= 1
    by_rank = loads.view(ep, per_rank).sum(1)
    assert by_rank.max() - by_rank.min() <= 1


def test_impossible_padding_is_refused():
    with pytest.raises(ValueError, match="cannot choose 3 of 2"):
        padding_rows(1, 2, 3)
