"""How routes travel: into the object store by the rollout's process, out of it by the ranks that train on them.

The driver passes handles along and never holds the arrays.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import ray

from roll_r3.batch.batch import Batch
from roll_r3.batch.routes import RoutedExperts
from roll_r3.batch.trajectory import Trajectory


@dataclass(frozen=True)
class StoredRoutes:
    """A `RouteHandle` to one of the arrays that were put into the object store together."""

    ref: ray.ObjectRef
    """Of a list of RoutedExperts."""
    index: int
    num_rows: int
    nbytes: int


def store_routes(trajectories: Sequence[Trajectory]) -> tuple[Trajectory, ...]:
    """Put the trajectories' routes into the object store as one object; trajectories with handles come back."""
    arrays = [t.routes for t in trajectories if isinstance(t.routes, RoutedExperts)]
    if not arrays:
        return tuple(trajectories)
    assert len(arrays) == len(trajectories), "routes of all samples of a prompt, or of none"
    ref = ray.put(arrays)
    return tuple(
        replace(t, routes=StoredRoutes(ref, i, routes.num_rows, routes.nbytes))
        for i, (t, routes) in enumerate(zip(trajectories, arrays, strict=True))
    )


def fetch_routes(batch: Batch) -> Batch:
    """The batch with its route arrays: zero-copy views where the object store is on this node."""
    if batch.routes is None:
        return batch
    handles = [r for r in batch.routes if isinstance(r, StoredRoutes)]
    refs = list({h.ref: None for h in handles})
    objects = dict(zip(refs, ray.get(refs), strict=True))
    return replace(
        batch, routes=tuple(objects[r.ref][r.index] if isinstance(r, StoredRoutes) else r for r in batch.routes)
    )
