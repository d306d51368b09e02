"""Routes on their way to a rank: what it asks for, and the pieces that it gets.

A rank asks for the layers that it holds and the rows that its routers will see, sample by sample. Whoever has the
routes answers with pieces: views where the routes lie in this machine's memory, otherwise views of one buffer that
holds what was asked for and nothing else.

Shape legend: M MoE layers, L a run of them, R rows, K experts per token.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from math import prod

import numpy as np
import numpy.typing as npt

from roll_r3.batch.routes import RouteArray, RoutedExperts, Routes
from roll_r3.batch.wire import EncodedGroup, RouteView
from roll_r3.errors import RouteError

Run = tuple[int, int]
"""The first of consecutive rows, and the row after the last."""


@dataclass(frozen=True, eq=False)
class RouteRequest:
    """What a rank needs of one sample."""

    routes: Routes
    layers: range
    """Consecutive ones, counted on axis M."""
    runs: tuple[Run, ...]
    """Ascending; none overlaps another."""

    @property
    def num_rows(self) -> int:
        return sum(end - start for start, end in self.runs)

    @property
    def nbytes(self) -> int:
        """Of the ids."""
        return len(self.layers) * self.num_rows * self.routes.top_k * self.routes.dtype.itemsize


@dataclass(frozen=True, eq=False)
class RoutePiece:
    """Consecutive rows of one sample, in the layers that were asked for."""

    start: int
    """The first, counted in the sample."""
    ids_LRK: RouteArray
    known_R: npt.NDArray[np.bool_] | None
    """As in `RoutedExperts`: None when every row is known."""

    @property
    def num_rows(self) -> int:
        return int(self.ids_LRK.shape[1])

    @property
    def known(self) -> npt.NDArray[np.bool_]:
        """Which rows the engine knew. [R]"""
        return np.ones(self.num_rows, np.bool_) if self.known_R is None else self.known_R


Pieces = list[RoutePiece]
"""Of one request, in the order of their rows, and together exactly the rows that it asked for."""
ReadRoutes = Callable[[Sequence[RouteRequest]], list[Pieces]]
"""Answers requests, in their order. Raises RouteError when routes are damaged, LostWorkerError when they are gone with
the process that stored them."""


def read_held(requests: Sequence[RouteRequest]) -> list[Pieces]:
    """Views of routes that this process holds.

    Raises:
        RouteError: a request for routes that lie elsewhere.
    """
    return [[_held(request.routes, request.layers, run) for run in request.runs] for request in requests]


def _held(routes: Routes, layers: range, run: Run) -> RoutePiece:
    if not isinstance(routes, RoutedExperts):
        raise RouteError(f"this process does not hold the routes: it has a {type(routes).__name__}")
    rows = slice(*run)
    known_R = None if routes.known_R is None else routes.known_R[rows]
    return RoutePiece(run[0], routes.ids_MRK[layers.start : layers.stop, rows], known_R)


def read_encoded(group: EncodedGroup, samples: Sequence[int], requests: Sequence[RouteRequest]) -> list[Pieces]:
    """Views of a wire form, their check sums checked.

    Args:
        samples: place in the group of each request's sample.

    Raises:
        RouteError: the ids do not match their check sums.
        IndexError: layers or samples that are not in the group.
    """
    for sample, request in zip(samples, requests, strict=True):
        _check_is(group, sample, request)
    by_layers: dict[range, list[int]] = defaultdict(list)
    for sample, request in zip(samples, requests, strict=True):
        by_layers[request.layers].append(sample)
    views = {
        (layers, sample): view
        for layers, asked in by_layers.items()
        for sample, view in zip(asked, group.view(layers, asked), strict=True)
    }
    return [
        [piece for run in request.runs for piece in _parts(views[request.layers, sample], run)]
        for sample, request in zip(samples, requests, strict=True)
    ]


def _check_is(group: EncodedGroup, sample: int, request: RouteRequest) -> None:
    """The wire form holds what the request's handle says."""
    held = (group.num_layers, group.num_rows(sample), group.top_k, group.dtype)
    routes = request.routes
    said = (routes.num_layers, routes.num_rows, routes.top_k, routes.dtype)
    if held != said:
        raise RouteError(
            f"encoded routes are not those that were asked for: sample {sample} is {held[3]} {list(held[:3])} [MoE "
            f"layers, rows, experts per token] there, not {said[3]} {list(said[:3])}"
        )
    if request.runs and request.runs[-1][1] > routes.num_rows:
        raise RouteError(f"rows up to {request.runs[-1][1]} were asked for, but sample {sample} has {routes.num_rows}")


def _parts(view: RouteView, run: Run) -> Iterator[RoutePiece]:
    """A run of a sample's rows: those shared with its group, and its own."""
    start, end = run
    shared = view.shared_LPK.shape[1]
    if start < shared:
        known = view.shared_known_P
        yield RoutePiece(start, view.shared_LPK[:, start:end], None if known is None else known[start:end])
    if end > shared:
        own, known = slice(max(start - shared, 0), end - shared), view.own_known_Q
        yield RoutePiece(max(start, shared), view.own_LQK[:, own], None if known is None else known[own])


@dataclass(frozen=True, eq=False)
class Parcel:
    """The answer to some requests as one buffer, for a process that shares no memory with the sender."""

    ids: npt.NDArray[np.uint8]
    """Bytes of the ids: request after request, run after run; in a run [L, R, K] in C order."""
    known: npt.NDArray[np.bool_] | None
    """Of each request's rows, one after the other; None when all are known."""

    @property
    def nbytes(self) -> int:
        return self.ids.nbytes + (0 if self.known is None else self.known.nbytes)


def pack(requests: Sequence[RouteRequest], answers: Sequence[Pieces]) -> Parcel:
    """Copy what was asked for, and nothing else, into one buffer."""
    ids = np.empty(sum(request.nbytes for request in requests), np.uint8)
    known = np.ones(sum(request.num_rows for request in requests), np.bool_)
    waiting = [iter(pieces) for pieces in answers]
    for number, (start, end), ids_LRK, known_R in _places(requests, ids, known):
        done = start
        while done < end:
            piece = next(waiting[number])
            rows = slice(done - start, done - start + piece.num_rows)
            np.copyto(ids_LRK[:, rows], piece.ids_LRK, casting="no")
            known_R[rows] = piece.known
            done += piece.num_rows
    return Parcel(ids, None if known.all() else known)


def unpack(requests: Sequence[RouteRequest], parcel: Parcel) -> list[Pieces]:
    """The pieces of a parcel, as views of it.

    Raises:
        RouteError: the parcel holds another number of bytes or rows than the requests ask for.
    """
    wanted = (sum(request.nbytes for request in requests), sum(request.num_rows for request in requests))
    known = np.ones(wanted[1], np.bool_) if parcel.known is None else parcel.known
    if (len(parcel.ids), len(known)) != wanted:
        raise RouteError(
            f"{len(parcel.ids)} bytes of routes came for {len(known)} rows, but {wanted[0]} for {wanted[1]} were asked "
            "for"
        )
    answers: list[Pieces] = [[] for _ in requests]
    for number, (start, _), ids_LRK, known_R in _places(requests, parcel.ids, known):
        answers[number].append(RoutePiece(start, ids_LRK, None if parcel.known is None else known_R))
    return answers


def _places(
    requests: Sequence[RouteRequest], ids: npt.NDArray[np.uint8], known: npt.NDArray[np.bool_]
) -> Iterator[tuple[int, Run, RouteArray, npt.NDArray[np.bool_]]]:
    """Where each run of each request lies in a parcel: (request's number, run, ids [L, R, K], known [R])."""
    at = row = 0
    for number, request in enumerate(requests):
        for start, end in request.runs:
            shape = (len(request.layers), end - start, request.routes.top_k)
            size = prod(shape) * request.routes.dtype.itemsize
            ids_LRK = ids[at : at + size].view(request.routes.dtype).reshape(shape)
            yield number, (start, end), ids_LRK, known[row : row + end - start]
            at += size
            row += end - start
