"""Where a bucket of weights may end."""

from __future__ import annotations

from roll_r3.cluster.workers import splits_a_pair

Q, KV = "model.layers.{}.self_attn.q_a_proj.weight", "model.layers.{}.self_attn.kv_a_proj_with_mqa.weight"


def test_two_projections_that_the_engine_fuses_stay_together() -> None:
    assert splits_a_pair(["x", Q.format(1)])
    assert splits_a_pair([Q.format(1), KV.format(1), Q.format(2), "y"])
    assert not splits_a_pair([Q.format(1), "y", KV.format(1)])
    assert not splits_a_pair(["model.layers.0.self_attn.q_proj.weight"])
    assert not splits_a_pair([KV.format(1)])  # Moonlight has no low-rank query
