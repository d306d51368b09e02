"""How routes travel: into the object store by the rollout's process, out of it by the ranks that train on them.

The routes of a prompt's samples are one object in their wire form, on the node of the engine. A rank on that node reads
views of it. For a rank elsewhere a task on that node cuts out the rows and layers that it asks for, and only these
travel. The driver passes handles along and never holds the arrays.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from roll_r3.batch.delivery import Parcel, Pieces, RouteRequest, pack, read_encoded, read_held, unpack
from roll_r3.batch.routes import RoutedExperts
from roll_r3.batch.trajectory import Trajectory
from roll_r3.batch.wire import EncodedGroup, encode
from roll_r3.errors import RouteError


@dataclass(frozen=True)
class StoredRoutes:
    """A `RouteHandle` to one sample of a wire form that lies in the object store."""

    ref: ray.ObjectRef
    """Of a uint8 array."""
    index: int
    """The sample's place in the group."""
    node_id: str
    """Where the object lies."""
    num_layers: int
    num_rows: int
    top_k: int
    dtype: np.dtype[Any]
    nbytes: int
    """The sample's share of the object."""


def store_routes(trajectories: Sequence[Trajectory], num_experts: int) -> tuple[Trajectory, ...]:
    """Put the trajectories' routes into the object store as one object; trajectories with handles come back.

    Raises:
        RouteError: routes that the wire form cannot hold (see `wire.encode`).
    """
    arrays = [t.routes for t in trajectories if isinstance(t.routes, RoutedExperts)]
    if not arrays:
        return tuple(trajectories)
    assert len(arrays) == len(trajectories), "routes of all samples of a prompt, or of none"
    encoded = encode(arrays, num_experts)
    ref, node_id = ray.put(encoded), ray.get_runtime_context().get_node_id()
    ends = [len(encoded) * i // len(arrays) for i in range(len(arrays) + 1)]
    return tuple(
        replace(
            t,
            routes=StoredRoutes(
                ref,
                i,
                node_id,
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
    """A `ReadRoutes` for handles, and for routes that this process holds.

    Raises:
        RouteError: routes that are damaged, or that the object store has lost.
    """
    here = ray.get_runtime_context().get_node_id()
    by_node: dict[str, list[int]] = defaultdict(list)
    answers: list[Pieces] = [[] for _ in requests]
    for i, request in enumerate(requests):
        if isinstance(request.routes, StoredRoutes):
            by_node[request.routes.node_id].append(i)
        else:
            [answers[i]] = read_held([request])
    parcels = {  # begun first: other nodes cut while this one reads its own
        node_id: _cut.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node_id, soft=False)).remote(
            [requests[i] for i in asked]
        )
        for node_id, asked in by_node.items()
        if node_id != here
    }
    for node_id, asked in by_node.items():
        wanted = [requests[i] for i in asked]
        try:
            found = _read_here(wanted) if node_id == here else unpack(wanted, ray.get(parcels[node_id]))
        except ray.exceptions.RayTaskError as error:
            raise error.as_instanceof_cause() from None
        except ray.exceptions.RayError as error:
            raise RouteError(f"routes are lost: they lay on node {node_id}: {error}") from error
        for i, pieces in zip(asked, found, strict=True):
            answers[i] = pieces
    return answers


@ray.remote(num_cpus=0)  # the training ranks and engines may have taken all of a node's
def _cut(requests: Sequence[RouteRequest]) -> Parcel:
    """On the node where the routes lie: what was asked for, and nothing else."""
    return pack(requests, _read_here(requests))


def _read_here(requests: Sequence[RouteRequest]) -> list[Pieces]:
    """Views of objects in this node's store."""
    handles = [request.routes for request in requests if isinstance(request.routes, StoredRoutes)]
    by_ref: dict[ray.ObjectRef, list[int]] = defaultdict(list)
    for i, handle in enumerate(handles):
        by_ref[handle.ref].append(i)
    answers: list[Pieces] = [[] for _ in requests]
    for (_, asked), encoded in zip(by_ref.items(), ray.get(list(by_ref)), strict=True):
        found = read_encoded(EncodedGroup(encoded), [handles[i].index for i in asked], [requests[i] for i in asked])
        for i, pieces in zip(asked, found, strict=True):
            answers[i] = pieces
    return answers
