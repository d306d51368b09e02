"""Contents and order of update requests."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from hypothesis import given
from hypothesis import strategies as st

from roll_r3.engines.sglang.buckets import fill_fused_buckets
from roll_r3.weights.buckets import Weight

Q, KV = "model.layers.{}.self_attn.q_a_proj.weight", "model.layers.{}.self_attn.kv_a_proj_with_mqa.weight"
PAIRED = [half.format(layer) for layer in (1, 11) for half in (Q, KV)]
PLAIN = ["model.layers.1.self_attn.q_proj.weight", "model.layers.1.self_attn.q_a_layernorm.weight"]


def weights(names: list[str]) -> list[Weight]:
    """Return weights of 4 bytes each."""
    return [(name, torch.zeros(2, dtype=torch.bfloat16)) for name in names]


def names_in(buckets: Iterator[list[Weight]]) -> list[list[str]]:
    return [[name for name, _ in bucket] for bucket in buckets]


def test_a_bucket_is_closed_once_it_is_full() -> None:
    assert names_in(fill_fused_buckets(weights(["a", "b", "c"]), 8)) == [["a", "b"], ["c"]]
    assert names_in(fill_fused_buckets(weights(["a", "b", "c"]), 5)) == [["a", "b"], ["c"]]
    assert names_in(fill_fused_buckets(weights(["a", "b"]), 8)) == [["a", "b"]]
    assert names_in(fill_fused_buckets([], 8)) == []


@given(names=st.permutations(PAIRED + PLAIN), size=st.integers(1, 30))
def test_two_projections_that_the_engine_fuses_share_a_bucket(names: list[str], size: int) -> None:
    """Send them in any order, with other weights between them."""
    given_weights = weights(names)
    buckets = list(fill_fused_buckets(given_weights, size))
    assert sorted(name for bucket in buckets for name, _ in bucket) == sorted(names)
    tensors = {name: tensor for bucket in buckets for name, tensor in bucket}
    assert all(tensors[name] is tensor for name, tensor in given_weights)
    for layer in (1, 11):
        assert [Q.format(layer) in dict(bucket) for bucket in buckets] == [
            KV.format(layer) in dict(bucket) for bucket in buckets
        ]
    assert all(sum(tensor.nbytes for _, tensor in bucket) >= size for bucket in buckets[:-1])


def test_a_half_that_has_no_other_is_sent_too() -> None:
    """Send Moonlight's query, which is not of low rank."""
    names = [KV.format(1), "x", KV.format(2), "y"]
    assert names_in(fill_fused_buckets(weights(names), 1)) == [["x"], ["y"], [KV.format(1)], [KV.format(2)]]


def test_nothing_is_gathered_before_there_is_room_for_it() -> None:
    taken = []

    def gathered() -> Iterator[Weight]:
        for weight in weights(["a", "b", "c"]):
            taken.append(weight[0])
            yield weight

    next(fill_fused_buckets(gathered(), 8))
    assert taken == ["a", "b"]
