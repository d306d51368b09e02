"""Routes on their way to a rank: requests, and pieces in answer.

A rank requests its own layers and the rows for its routers, sample by sample. The holder of the routes answers with
pieces. They are views of the routes if these are in this machine's memory. Otherwise they are views of one buffer with
exactly the requested rows.

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
    """Rows and layers of one sample needed by a rank."""

    routes: Routes
    layers: range
    """Consecutive layers, counted on axis M."""
    runs: tuple[Run, ...]
    """Runs of rows, ascending and without overlap."""

    @property
    def num_rows(self) -> int:
        return sum(end - start for start, end in self.runs)

    @property
    def nbytes(self) -> int:
        """Size of the ids in bytes."""
        return len(self.layers) * self.num_rows * self.routes.top_k * self.routes.dtype.itemsize


@dataclass(frozen=True, eq=False)
class RoutePiece:
    """Consecutive rows of one sample, in the requested layers."""

    start: int
    """First row, counted in the sample."""
    ids_LRK: RouteArray
    known_R: npt.NDArray[np.bool_] | None
    """As in `RoutedExperts`: None when every row is known."""

    @property
    def num_rows(self) -> int:
        return int(self.ids_LRK.shape[1])

    @property
    def known(self) -> npt.NDArray[np.bool_]:
        """Mask of the rows recorded by the engine. [R]"""
        return np.ones(self.num_rows, np.bool_) if self.known_R is None else self.known_R


Pieces = list[RoutePiece]
"""Pieces of one request in the order of their rows; together exactly the requested rows."""
ReadRoutes = Callable[[Sequence[RouteRequest]], list[Pieces]]
"""Answers requests, in their order. Raises RouteError for damaged routes, LostWorkerError if the process holding them
is gone."""


def read_held(requests: Sequence[RouteRequest]) -> list[Pieces]:
    """Read routes held by this process, as views.

    Raises:
        RouteError: another process holds the routes.
    """
    return [[_held(request.routes, request.layers, run) for run in request.runs] for request in requests]


def _held(routes: Routes, layers: range, run: Run) -> RoutePiece:
    if not isinstance(routes, RoutedExperts):
        raise RouteError(f"this process does not hold the routes: got a {type(routes).__name__}")
    rows = slice(*run)
    known_R = None if routes.known_R is None else routes.known_R[rows]
    return RoutePiece(run[0], routes.ids_MRK[layers.start : layers.stop, rows], known_R)


def read_encoded(group: EncodedGroup, samples: Sequence[int], requests: Sequence[RouteRequest]) -> list[Pieces]:
    """Read a wire form as views, with verified checksums.

    Args:
        samples: index in the group of each request's sample.

    Raises:
        RouteError: the ids do not match their checksums.
        IndexError: layers or samples outside the group.
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
    """Check the wire form against the request's handle."""
    held = (group.num_layers, group.num_rows(sample), group.top_k, group.dtype)
    routes = request.routes
    said = (routes.num_layers, routes.num_rows, routes.top_k, routes.dtype)
    if held != said:
        raise RouteError(
            f"encoded routes differ from the requested ones: sample {sample} is {held[3]} {list(held[:3])} [MoE "
            f"layers, rows, experts per token], not {said[3]} {list(said[:3])}"
        )
    if request.runs and request.runs[-1][1] > routes.num_rows:
        raise RouteError(f"rows up to {request.runs[-1][1]} were requested, but sample {sample} has {routes.num_rows}")


def _parts(view: RouteView, run: Run) -> Iterator[RoutePiece]:
    """Split a run of a sample's rows into the rows shared with its group, and its own."""
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
    """The answer to requests as one buffer, for a process without shared memory."""

    ids: npt.NDArray[np.uint8]
    """Bytes of the ids by request and run; each run is [L, R, K] in C order."""
    known: npt.NDArray[np.bool_] | None
    """Mask of known rows of all requests, concatenated; None when all are known."""

    @property
    def nbytes(self) -> int:
        return self.ids.nbytes + (0 if self.known is None else self.known.nbytes)


def pack(requests: Sequence[RouteRequest], answers: Sequence[Pieces]) -> Parcel:
    """Copy the requested rows into one buffer."""
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
    """Split a parcel into pieces, as views of it.

    Raises:
        RouteError: the parcel's number of bytes or rows differs from the requests.
    """
    wanted = (sum(request.nbytes for request in requests), sum(request.num_rows for request in requests))
    known = np.ones(wanted[1], np.bool_) if parcel.known is None else parcel.known
    if (len(parcel.ids), len(known)) != wanted:
        raise RouteError(
            f"got {len(parcel.ids)} bytes of routes for {len(known)} rows, but {wanted[0]} for {wanted[1]} were "
            "requested"
        )
    answers: list[Pieces] = [[] for _ in requests]
    for number, (start, _), ids_LRK, known_R in _places(requests, parcel.ids, known):
        answers[number].append(RoutePiece(start, ids_LRK, None if parcel.known is None else known_R))
    return answers


def _places(
    requests: Sequence[RouteRequest], ids: npt.NDArray[np.uint8], known: npt.NDArray[np.bool_]
) -> Iterator[tuple[int, Run, RouteArray, npt.NDArray[np.bool_]]]:
    """Place of each run of each request in a parcel: (request's number, run, ids [L, R, K], known [R])."""
    at = row = 0
    for number, request in enumerate(requests):
        for start, end in request.runs:
            shape = (len(request.layers), end - start, request.routes.top_k)
            size = prod(shape) * request.routes.dtype.itemsize
            ids_LRK = ids[at : at + size].view(request.routes.dtype).reshape(shape)
            yield number, (start, end), ids_LRK, known[row : row + end - start]
            at += size
            row += end - start
