"""Rows delivered to every rank of a layout, against its routers' needs, counted token by token."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import product
from typing import Any

import numpy as np
import pytest

from roll_r3.batch.batch import Batch
from roll_r3.batch.micro_batch import MicroBatch
from roll_r3.batch.route_pieces import Parcel, Pieces, RouteRequest, pack, read_encoded, read_held, unpack
from roll_r3.batch.routes import RoutedExperts
from roll_r3.batch.token_map import PADDING, Layout
from roll_r3.batch.wire import EncodedGroup, encode
from roll_r3.models.facts import ModelFacts
from roll_r3.replay.rows import deliver
from roll_r3.trainers.cutting import cut, fill_up

LENGTHS, SHARED, LAYERS, EXPERTS, TOP_K = (17, 40, 9, 33, 26, 12), 8, 8, 16, 2
FACTS = ModelFacts("test", LAYERS, tuple(range(LAYERS)), EXPERTS, TOP_K, 1, 1, 32, 64)


def batch() -> Batch:
    rng = np.random.default_rng(3)
    prompt = rng.integers(0, EXPERTS, (LAYERS, SHARED, TOP_K)).astype(np.uint8)
    own = [rng.integers(0, EXPERTS, (LAYERS, n - SHARED, TOP_K)).astype(np.uint8) for n in LENGTHS]
    total = sum(LENGTHS)
    return Batch(
        sample_ids=tuple("abcdef"),
        lengths_n=np.array(LENGTHS),
        input_ids_N=np.arange(total),
        labels_N=np.arange(total),
        loss_mask_N=np.ones(total, np.bool_),
        rollout_log_probs_N=np.zeros(total, np.float32),
        routes=tuple(RoutedExperts(np.concatenate([prompt, ids], axis=1)) for ids in own),
    )


class Sender:
    """Node with the wire form of all samples; it cuts out the rows requested by a rank on another node."""

    def __init__(self, routes: Sequence[RoutedExperts]) -> None:
        self.group = EncodedGroup(encode(routes, EXPERTS))
        self.places = {id(r): i for i, r in enumerate(routes)}
        self.parcels: list[Parcel] = []
        self.requests = 0

    def read(self, requests: Sequence[RouteRequest]) -> list[Pieces]:
        self.requests += len(requests)
        found = read_encoded(self.group, [self.places[id(request.routes)] for request in requests], requests)
        self.parcels.append(pack(requests, found))
        return unpack(requests, self.parcels[-1])


CHUNKS = {"one stage": [range(8)], "PP2": [range(4, 8)], "PP2 VPP2": [range(2), range(4, 6)], "dense": [range(0)]}
LAYOUTS = {
    f"{'packed' if packed else 'padded'} CP{cp} SP{sp}": (packed, cp, sp)
    for packed, cp, sp in product((False, True), (1, 2, 4), (1, 2))
}


@pytest.mark.parametrize("chunks", CHUNKS.values(), ids=CHUNKS)
@pytest.mark.parametrize(("packed", "cp", "sp"), LAYOUTS.values(), ids=LAYOUTS)
def test_a_rank_is_handed_what_it_needs(packed: bool, cp: int, sp: int, chunks: list[range]) -> None:
    handed = needed = seen = 0
    for cp_rank, sp_rank in product(range(cp), range(sp)):
        layout = Layout(packed=packed, cp_size=cp, cp_rank=cp_rank, sp_size=sp, sp_rank=sp_rank)
        micro_batches = fill_up(cut(batch(), [np.array([0, 3, 4]), np.array([1, 2, 5])], layout), 3)
        sender = Sender(batch_routes := micro_batches[0].batch.routes + micro_batches[1].batch.routes)
        assert len(batch_routes) == len(LENGTHS)
        delivered = deliver(micro_batches, chunks, num_layers=LAYERS, facts=FACTS, read=sender.read)
        assert len(sender.parcels) == 1, "everything at once"
        assert delivered[2].routes is delivered[1].routes, "once"
        handed += sum(parcel.nbytes for parcel in sender.parcels)
        for micro in delivered[:2]:
            needed += check(micro, chunks)
            seen += np.count_nonzero(micro.tokens.router_slots_t != PADDING)
    assert seen == sum(LENGTHS), "each token on one rank"
    assert needed == seen * sum(len(rows) for rows in chunks) * TOP_K
    assert handed == needed


def check(micro: MicroBatch, chunks: list[range]) -> int:
    """Check that exactly the tokens seen by the routers have rows; return the bytes of the rows."""
    where = [(sample, p) for sample, n in enumerate(micro.batch.lengths_n) for p in range(n)]
    seen = [where[slot] for slot in sorted(micro.tokens.router_slots_t[micro.tokens.router_slots_t != PADDING])]
    assert micro.routes is not None
    for rows, pieces in zip(chunks, micro.routes, strict=True):
        came = [(piece, i) for piece in pieces for i in range(piece.num_rows)]
        if not rows:
            assert not came
            continue
        for (sample, position), (piece, i) in zip(seen, came, strict=True):
            routes: Any = micro.batch.routes[sample]  # type: ignore[index]
            assert piece.start + i == position
            assert piece.ids_LRK[:, i].tolist() == routes.ids_MRK[rows.start : rows.stop, position].tolist()
    return len(seen) * sum(len(rows) for rows in chunks) * TOP_K


def test_a_sequence_chunk_asks_for_the_samples_it_holds() -> None:
    layout = Layout(packed=True, sp_size=8, sp_rank=7, multiple=1)
    [micro] = cut(batch(), [np.arange(6)], layout)
    sender = Sender(micro.batch.routes)  # type: ignore[arg-type]
    deliver([micro], [range(4)], num_layers=LAYERS, facts=FACTS, read=sender.read)
    assert sender.requests == 1, "the last eighth of the packed row lies in the last sample"


def test_the_same_rows_whoever_reads_them() -> None:
    [micro] = cut(batch(), [np.arange(6)], Layout(packed=True, cp_size=2))
    rows = [range(2, 5)]
    sender = Sender(micro.batch.routes)  # type: ignore[arg-type]
    [far] = deliver([micro], rows, num_layers=LAYERS, facts=FACTS, read=sender.read)
    [near] = deliver([micro], rows, num_layers=LAYERS, facts=FACTS, read=read_held)
    joined = [np.concatenate([p.ids_LRK for p in m.routes[0]], axis=1) for m in (far, near)]  # type: ignore[index]
    assert (joined[0] == joined[1]).all()


def test_repeats_share_what_was_delivered() -> None:
    micro_batches = cut(batch(), [np.arange(3)], Layout())
    repeated = [*micro_batches, replace(micro_batches[0], counted=False)]
    first, second = deliver(repeated, [range(8)], num_layers=LAYERS, facts=FACTS, read=read_held)
    assert first.routes is second.routes
    assert (first.counted, second.counted) == (True, False)
