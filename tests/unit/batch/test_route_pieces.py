"""Routes requested by layers and runs of rows, on any node, equal the rows of their arrays."""

from __future__ import annotations

import pickle
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from roll_r3.batch.route_pieces import RouteRequest, pack, read_encoded, read_held, unpack
from roll_r3.batch.routes import RoutedExperts, route_dtype
from roll_r3.batch.wire import EncodedGroup, encode
from roll_r3.errors import RouteError


@dataclass(frozen=True)
class Case:
    group: tuple[RoutedExperts, ...]
    num_experts: int
    asked: tuple[tuple[int, range, tuple[tuple[int, int], ...]], ...]
    """(sample, layers, runs of rows) of each request."""

    @property
    def requests(self) -> list[RouteRequest]:
        return [RouteRequest(self.group[sample], layers, runs) for sample, layers, runs in self.asked]

    @property
    def samples(self) -> list[int]:
        return [sample for sample, _, _ in self.asked]


@st.composite
def cases(draw: Any) -> Case:
    experts, layers, top_k = draw(st.sampled_from([4, 300])), draw(st.integers(1, 4)), draw(st.integers(1, 3))
    shared, own = draw(st.integers(0, 5)), draw(st.lists(st.integers(0, 6), min_size=1, max_size=4))
    rng = np.random.default_rng(draw(st.integers(0, 1 << 16)))

    def ids(rows: int) -> Any:
        return rng.integers(0, experts, (layers, rows, top_k)).astype(route_dtype(experts))

    prompt, known = ids(shared), draw(st.booleans())
    group = []
    for rows in own:
        mask = np.concatenate([np.ones(shared, np.bool_), rng.random(rows) < 0.5])
        group.append(RoutedExperts(np.concatenate([prompt, ids(rows)], axis=1), None if known else mask))

    def runs(rows: int) -> tuple[tuple[int, int], ...]:
        cuts = sorted(draw(st.sets(st.integers(0, rows), max_size=6)))
        return tuple((a, b) for a, b in zip(cuts[::2], cuts[1::2], strict=False))

    asked = []
    for _ in range(draw(st.integers(0, 5))):
        sample, first = draw(st.integers(0, len(own) - 1)), draw(st.integers(0, layers - 1))
        asked.append((sample, range(first, draw(st.integers(first + 1, layers))), runs(shared + own[sample])))
    return Case(tuple(group), experts, tuple(asked))


def rows_of(case: Case, answers: Any) -> None:
    """Compare every answer with the rows of the arrays."""
    assert len(answers) == len(case.asked)
    for (sample, layers, runs), pieces in zip(case.asked, answers, strict=True):
        routes = case.group[sample]
        wanted = [row for start, end in runs for row in range(start, end)]
        assert [row for piece in pieces for row in range(piece.start, piece.start + piece.num_rows)] == wanted
        for piece in pieces:
            assert piece.ids_LRK.dtype == routes.dtype
            for i, layer in enumerate(layers):
                for j in range(piece.num_rows):
                    assert piece.ids_LRK[i, j].tolist() == routes.ids_MRK[layer, piece.start + j].tolist()
            known = [True] * routes.num_rows if routes.known_R is None else routes.known_R.tolist()
            said = [True] * piece.num_rows if piece.known_R is None else piece.known_R.tolist()
            assert said == known[piece.start : piece.start + piece.num_rows]


@given(cases())
def test_held_arrays_are_read_in_place(case: Case) -> None:
    answers = read_held(case.requests)
    rows_of(case, answers)
    for request, pieces in zip(case.requests, answers, strict=True):
        assert all(np.shares_memory(p.ids_LRK, request.routes.ids_MRK) for p in pieces if p.ids_LRK.size)


@given(cases())
def test_a_wire_form_is_read_in_place(case: Case) -> None:
    encoded = encode(case.group, case.num_experts)
    answers = read_encoded(EncodedGroup(encoded), case.samples, case.requests)
    rows_of(case, answers)
    assert all(np.shares_memory(piece.ids_LRK, encoded) for pieces in answers for piece in pieces)


@given(cases())
def test_a_parcel_holds_what_was_asked_for_and_nothing_else(case: Case) -> None:
    encoded = encode(case.group, case.num_experts)
    parcel = pack(case.requests, read_encoded(EncodedGroup(encoded), case.samples, case.requests))
    ids = sum(read.ids_LRK.nbytes for pieces in read_held(case.requests) for read in pieces)
    assert parcel.ids.nbytes == ids == sum(request.nbytes for request in case.requests)
    assert parcel.nbytes - ids in (0, sum(request.num_rows for request in case.requests))
    answers = unpack(case.requests, pickle.loads(pickle.dumps(parcel)))
    rows_of(case, answers)


def test_a_parcel_of_another_size_is_refused() -> None:
    routes = RoutedExperts(np.zeros((2, 5, 2), np.uint8), np.arange(5) != 1)
    asked, other = [RouteRequest(routes, range(2), ((0, 5),))], [RouteRequest(routes, range(2), ((0, 4),))]
    parcel = pack(asked, read_held(asked))
    with pytest.raises(RouteError, match="20 bytes of routes for 5 rows"):
        unpack(other, parcel)


@pytest.mark.parametrize(
    "other",
    [
        RoutedExperts(np.zeros((2, 5, 2), np.uint16)),
        RoutedExperts(np.zeros((2, 5, 4), np.uint8)),
        RoutedExperts(np.zeros((2, 6, 2), np.uint8)),
        RoutedExperts(np.zeros((3, 5, 2), np.uint8)),
    ],
)
def test_a_wire_form_of_other_routes_is_refused(other: RoutedExperts) -> None:
    encoded = encode([RoutedExperts(np.zeros((2, 5, 2), np.uint8))], 16)
    with pytest.raises(RouteError, match=r"differ from the requested ones: sample 0 is uint8 \[2, 5, 2\]"):
        read_encoded(EncodedGroup(encoded), [0], [RouteRequest(other, range(1), ((0, 1),))])


def test_rows_beyond_the_sample_are_refused() -> None:
    routes = RoutedExperts(np.zeros((2, 5, 2), np.uint8))
    with pytest.raises(RouteError, match="rows up to 6 were requested, but sample 0 has 5"):
        read_encoded(EncodedGroup(encode([routes], 16)), [0], [RouteRequest(routes, range(1), ((0, 6),))])


def test_a_damaged_wire_form_is_refused() -> None:
    routes = RoutedExperts(np.zeros((2, 5, 2), np.uint8))
    encoded = encode([routes], 16)
    encoded[-1] ^= 1
    request = RouteRequest(routes, range(1, 2), ((0, 1),))
    with pytest.raises(RouteError, match="checksum of sample 0 in MoE layer 1 is wrong"):
        read_encoded(EncodedGroup(encoded), [0], [request])
