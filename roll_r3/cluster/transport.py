"""Transport of routes: into the object store by the rollout's process, out of it by the training ranks.

The routes of a prompt's samples are one object in their wire form, on the node of the engine. A rank on the same node
reads views of it. For a rank elsewhere the storing process cuts out the wanted rows and layers, and only these travel.
The driver passes handles along and never holds the arrays.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import ray

from roll_r3.batch.route_pieces import Parcel, Pieces, RouteRequest, pack, read_encoded, read_held, unpack
from roll_r3.batch.routes import RoutedExperts
from roll_r3.batch.trajectory import Trajectory
from roll_r3.batch.wire import EncodedGroup, encode
from roll_r3.errors import LostWorkerError, RollError


@dataclass(frozen=True)
class StoredRoutes:
    """A `RouteHandle` to one sample of a wire form in the object store."""

    ref: ray.ObjectRef[npt.NDArray[np.uint8]]
    """Reference to a uint8 array."""
    index: int
    """The sample's place in the group."""
    node_id: str
    """Node of the object."""
    keeper: str
    """Name of the storing actor: its method `cut_routes` is `cut`."""
    num_layers: int
    num_rows: int
    top_k: int
    dtype: np.dtype[Any]
    nbytes: int
    """The sample's share of the object."""


def store_routes(trajectories: Sequence[Trajectory], num_experts: int) -> tuple[Trajectory, ...]:
    """Put the trajectories' routes into the object store as one object; return trajectories with handles.

    The calling process must be an actor with a name and a method `cut_routes`.

    Raises:
        RouteError: the wire form cannot hold the routes (see `wire.encode`).
    """
    arrays = [t.routes for t in trajectories if isinstance(t.routes, RoutedExperts)]
    if not arrays:
        return tuple(trajectories)
    assert len(arrays) == len(trajectories), "routes of all samples of a prompt, or of none"
    encoded = encode(arrays, num_experts)
    context, ref = ray.get_runtime_context(), ray.put(encoded)
    node_id, keeper = context.get_node_id(), context.get_actor_name()
    assert keeper is not None, "an actor calls this"
    ends = [len(encoded) * i // len(arrays) for i in range(len(arrays) + 1)]
    return tuple(
        replace(
            t,
            routes=StoredRoutes(
                ref,
                i,
                node_id,
                keeper,
                num_layers=routes.num_layers,
                num_rows=routes.num_rows,
                top_k=routes.top_k,
                dtype=routes.dtype,
                nbytes=ends[i + 1] - ends[i],
            ),
        )
        for i, (t, routes) in enumerate(zip(trajectories, arrays, strict=True))
    )


def read_routes(requests: Sequence[RouteRequest]) -> list[Pieces]:
    """Read routes behind handles, and routes held by this process. A `ReadRoutes`.

    Raises:
        RouteError: damaged routes.
        LostWorkerError: the routes are gone with their storing process, or with its node.
    """
    here = ray.get_runtime_context().get_node_id()
    near: list[int] = []
    far: dict[str, list[int]] = defaultdict(list)
    answers: list[Pieces] = [[] for _ in requests]
    for i, request in enumerate(requests):
        if not isinstance(request.routes, StoredRoutes):
            [answers[i]] = read_held([request])
        elif request.routes.node_id == here:
            near.append(i)
        else:
            far[request.routes.keeper].append(i)
    with _as_lost_worker():
        # first, so that others cut while this process reads what is near
        parcels = {
            keeper: _actor(keeper).cut_routes.remote([requests[i] for i in asked]) for keeper, asked in far.items()
        }
        found = [(near, _read_near([requests[i] for i in near]))]
        found += [
            (asked, unpack([requests[i] for i in asked], ray.get(parcels[keeper]))) for keeper, asked in far.items()
        ]
    for asked, read in found:
        for i, pieces in zip(asked, read, strict=True):
            answers[i] = pieces
    return answers


def cut(requests: Sequence[RouteRequest]) -> Parcel:
    """Cut the requested routes, and nothing else, on their node. Raises as `read_routes`."""
    with _as_lost_worker():
        return pack(requests, _read_near(requests))


@contextmanager
def _as_lost_worker() -> Iterator[None]:
    try:
        yield
    except ray.exceptions.RayTaskError as error:  # of the process that cut
        if isinstance(error.cause, RollError):
            raise error.cause from None
        raise
    except ray.exceptions.RayError as error:
        raise _lost(error) from error


def _actor(name: str) -> Any:
    try:
        return ray.get_actor(name)
    except ValueError as error:  # no actor has that name any more
        raise _lost(error) from error


def _lost(error: Exception) -> LostWorkerError:
    return LostWorkerError(f"routes are lost, since the process that stored them ended: {error}")


def _read_near(requests: Sequence[RouteRequest]) -> list[Pieces]:
    """Views of objects in this node's store."""
    handles = [request.routes for request in requests if isinstance(request.routes, StoredRoutes)]
    by_ref: dict[ray.ObjectRef[npt.NDArray[np.uint8]], list[int]] = defaultdict(list)
    for i, handle in enumerate(handles):
        by_ref[handle.ref].append(i)
    answers: list[Pieces] = [[] for _ in requests]
    for (_, asked), encoded in zip(by_ref.items(), ray.get(list(by_ref)), strict=True):
        read = read_encoded(EncodedGroup(encoded), [handles[i].index for i in asked], [requests[i] for i in asked])
        for i, pieces in zip(asked, read, strict=True):
            answers[i] = pieces
    return answers
