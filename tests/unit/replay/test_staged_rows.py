"""Rows staged by a replay session for each router, in every layout, against loops over the batch."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from roll_r3.batch.batch import Batch
from roll_r3.batch.micro_batch import MicroBatch
from roll_r3.batch.route_pieces import read_held
from roll_r3.batch.routes import RoutedExperts, route_dtype
from roll_r3.batch.token_map import PADDING, Layout
from roll_r3.models.facts import ModelFacts
from roll_r3.replay.padding import padding_rows
from roll_r3.replay.rows import chunk_rows, deliver
from roll_r3.replay.session import ReplaySession
from roll_r3.trainers.cutting import cut

LENGTHS, TOP_K, MOE_LAYERS = (3, 9, 6), 2, (1, 3, 5, 7)


class Router:
    """Router that holds any layer attached by a session."""

    recomputed = True
    held: Any = None

    def __init__(self, layer: int) -> None:
        self.layer = layer

    @property
    def attached(self) -> bool:
        return self.held is not None

    def attach(self, layer: Any) -> None:
        self.held = layer

    def detach(self) -> None:
        self.held = None


def batch_of(experts: int, unknown: float) -> Batch:
    rng = np.random.default_rng(7)
    routes = []
    for n in LENGTHS:
        ids = rng.random((len(MOE_LAYERS), n, experts)).argsort(-1)[..., :TOP_K].astype(route_dtype(experts))
        known = rng.random(n) >= unknown
        routes.append(RoutedExperts(ids, None if known.all() else known))
    total = sum(LENGTHS)
    return Batch(
        sample_ids=("a", "b", "c"),
        lengths_n=np.array(LENGTHS),
        input_ids_N=np.arange(total),
        labels_N=np.arange(total),
        loss_mask_N=np.arange(total) % 2 == 0,
        rollout_log_probs_N=np.zeros(total, np.float32),
        routes=tuple(routes),
    )


def session_over(layers: list[int], experts: int, *, forward_only: bool = False) -> ReplaySession:
    return ReplaySession(
        [[Router(layer) for layer in layers]],
        1,
        facts=ModelFacts("test", 8, MOE_LAYERS, experts, TOP_K, 1, 1, 32, 64),
        ep_size=1,
        device=torch.device("cpu"),
        forward_only=forward_only,
        compares=forward_only,
    )


def delivered(session: ReplaySession, micro: MicroBatch) -> MicroBatch:
    rows = chunk_rows(session.routers, {layer: row for row, layer in enumerate(MOE_LAYERS)})
    [micro] = deliver([micro], rows, num_layers=len(MOE_LAYERS), facts=session.facts, read=read_held)
    return micro


def run(session: ReplaySession, micro: MicroBatch, live_tK: torch.Tensor) -> list[list[torch.Tensor]]:
    """Run one forward and one recompute of every router; return the results of each."""
    tokens = len(live_tK)
    micro = delivered(session, micro)
    with session:
        with session.micro_batch(0, micro):
            forward = [layer.route(tokens, TOP_K, lambda: live_tK) for layer in session.layers[0]]
            waiting = [ids.dtype for layer in session.layers[0] for ids in layer.queue]
        if session.forward_only:
            return [forward]
        dtype = torch.uint8 if session.facts.num_experts <= 256 else torch.int16
        assert waiting == [dtype] * len(forward), "int64 is for one layer at a time"
        again = [layer.route(tokens, TOP_K, lambda: 1 - live_tK) for layer in session.layers[0]]
    return [forward, again]


LAYOUTS = {
    "padded": Layout(),
    "padded SP": Layout(sp_size=2, sp_rank=1),
    "padded CP SP": Layout(cp_size=2, cp_rank=1, sp_size=2, sp_rank=0),
    "rows outer": Layout(batch_outer=True),
    "packed": Layout(packed=True),
    "packed SP, first": Layout(packed=True, sp_size=2, sp_rank=0, multiple=2),
    "packed SP, last": Layout(packed=True, sp_size=2, sp_rank=1, multiple=2),
    "packed CP": Layout(packed=True, cp_size=2, cp_rank=1),
    "packed CP SP": Layout(packed=True, cp_size=2, cp_rank=0, sp_size=2, sp_rank=1),
}


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("layers", [[1, 3, 5, 7], [3, 5], [7]], ids=str)
@pytest.mark.parametrize(("experts", "unknown"), [(16, 0.0), (16, 0.4), (256, 0.4), (300, 0.4), (60_000, 0.4)])
def test_each_router_gets_its_tokens_rows(layout: Layout, layers: list[int], experts: int, unknown: float) -> None:
    batch = batch_of(experts, unknown)
    micro = cut(batch, [np.arange(len(LENGTHS))], layout)[0]
    slots = micro.tokens.router_slots_t
    live = torch.stack([torch.full((len(slots),), experts - 1), torch.full((len(slots),), experts - 2)], 1)
    session = session_over(layers, experts)
    returned = run(session, micro, live)

    offsets = batch.offsets
    where = [(sample, p) for sample, n in enumerate(LENGTHS) for p in range(n)]
    assert [offsets[sample] + p for sample, p in where] == list(range(sum(LENGTHS)))
    missing = 0
    for rows in returned:
        for layer, ids in zip(layers, rows, strict=True):
            padding = iter(padding_rows(int((slots == PADDING).sum()), experts, TOP_K))
            for slot, got in zip(slots, ids, strict=True):
                if slot == PADDING:
                    assert torch.equal(got, next(padding))
                    continue
                sample, position = where[slot]
                routes = batch.routes[sample]
                if routes.known_R is not None and not routes.known_R[position]:
                    missing += 1
                    assert got.tolist() == [experts - 1, experts - 2]
                else:
                    assert got.tolist() == routes.ids_MRK[MOE_LAYERS.index(layer), position].tolist()
            assert ids.dtype == torch.int64
    assert session.counts.missing == missing / 2
    assert session.counts.padded == (slots == PADDING).sum() * len(layers)
    assert session.counts.trainable == sum(s % 2 == 0 for s in slots if s != PADDING) * len(layers)


def test_a_rank_that_holds_only_padding_needs_no_rows() -> None:
    batch = batch_of(16, 0.4).select([0])
    micro = cut(batch, [np.array([0])], Layout(packed=True, sp_size=4, sp_rank=3))[0]
    assert (micro.tokens.router_slots_t == PADDING).all()
    session = session_over([3], 16)
    forward, again = run(session, micro, torch.zeros(1, TOP_K, dtype=torch.int64))
    assert forward[0].tolist() == again[0].tolist() == padding_rows(1, 16, TOP_K).tolist()
    assert session.counts.missing == session.counts.trainable == 0


def test_agreement_is_counted_over_known_rows() -> None:
    batch = batch_of(16, 0.4)
    micro = cut(batch, [np.arange(len(LENGTHS))], Layout(packed=True))[0]
    known = np.concatenate([routes.known_R for routes in batch.routes])
    live = torch.from_numpy(np.concatenate([r.ids_MRK[2] for r in batch.routes]).astype(np.int64)).flip(1)
    session = session_over([3, 5], 16, forward_only=True)
    run(session, micro, live)
    assert session.counts.compared == 2 * known.sum()
    same = sum(
        set(a) == set(b)
        for row in (1, 2)
        for a, b, k in zip(
            np.concatenate([r.ids_MRK[row] for r in batch.routes]).tolist(), live.tolist(), known, strict=True
        )
        if k
    )
    assert session.counts.agreed == same >= known.sum()


def test_a_repeat_that_fills_the_schedule_is_not_counted() -> None:
    batch = batch_of(16, 0.4)
    micro = replace(cut(batch, [np.arange(len(LENGTHS))], Layout(packed=True))[0], counted=False)
    session = session_over([3], 16)
    run(session, micro, torch.zeros(sum(LENGTHS), TOP_K, dtype=torch.int64))
    assert session.counts.missing == session.counts.trainable == session.counts.padded == 0
