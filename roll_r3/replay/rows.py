"""Rows of the samples' routes needed by each micro-batch on this rank: seen by its routers, in the layers it holds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
import numpy.typing as npt

from roll_r3.batch.batch import Batch
from roll_r3.batch.micro_batch import MicroBatch
from roll_r3.batch.route_pieces import ReadRoutes, RoutePiece, RouteRequest, Run
from roll_r3.batch.routes import Routes, route_dtype
from roll_r3.batch.token_map import TokenMap
from roll_r3.errors import ReplayError
from roll_r3.models.facts import ModelFacts
from roll_r3.replay.layer import Router


def chunk_rows(routers: Sequence[Sequence[Router]], layer_rows: Mapping[int, int]) -> list[range]:
    """Rows of each chunk's layers on axis M of the routes. A chunk holds consecutive layers, so its rows are a range.

    Args:
        layer_rows: global layer -> its row on axis M.
    """
    runs = []
    for chunk in routers:
        rows = [layer_rows[router.layer] for router in chunk]
        run = range(rows[0], rows[0] + len(rows)) if rows else range(0)
        assert rows == list(run), f"the routers of a chunk lie on the rows {rows}, not on a range"
        runs.append(run)
    return runs


def deliver(
    micro_batches: Sequence[MicroBatch],
    rows_of_chunks: Sequence[range],
    *,
    num_layers: int,
    facts: ModelFacts,
    read: ReadRoutes,
) -> list[MicroBatch]:
    """Add the rows needed by this rank's routers to the micro-batches. All are read at once, each once.

    Args:
        rows_of_chunks: the result of `chunk_rows`.
        num_layers: M of the routes.

    Raises:
        ReplayError: no routes, or routes of another shape or dtype than the samples and the model need.
        RouteError: damaged routes.
        LostWorkerError: the process holding the routes is gone.
    """
    requests: list[RouteRequest] = []
    ranges: dict[Batch, list[slice]] = {}
    for micro in micro_batches:
        if micro.batch in ranges:  # a repeat, to fill the schedule
            continue
        routes = _checked(micro.batch, num_layers, facts)
        runs = _needed(micro.tokens, micro.batch.offsets)
        slices = ranges[micro.batch] = []
        for layers in rows_of_chunks:
            first = len(requests)
            if layers:
                requests += [RouteRequest(routes[sample], layers, tuple(r)) for sample, r in runs.items()]
            slices.append(slice(first, len(requests)))
    answers = read(requests)

    def pieces(asked: slice) -> tuple[RoutePiece, ...]:
        return tuple(piece for answer in answers[asked] for piece in answer)

    delivered = {batch: tuple(pieces(asked) for asked in slices) for batch, slices in ranges.items()}
    return [replace(micro, routes=delivered[micro.batch]) for micro in micro_batches]


def _checked(batch: Batch, num_layers: int, facts: ModelFacts) -> Sequence[Routes]:
    if batch.routes is None:
        raise ReplayError("the batch carries no routes")
    dtype = route_dtype(facts.num_experts)
    for sample_id, length, routes in zip(batch.sample_ids, batch.lengths_n.tolist(), batch.routes, strict=True):
        found = (routes.num_layers, routes.num_rows, routes.top_k)
        expected = (num_layers, length, facts.top_k)
        if found != expected:
            raise ReplayError(
                f"the routes of sample {sample_id} are {list(found)} [MoE layers, rows, experts per token], but its "
                f"{length} inputs and this model need {list(expected)}"
            )
        if routes.dtype != dtype:
            raise ReplayError(
                f"the routes of sample {sample_id} are {routes.dtype}, but ids of {facts.num_experts} experts are kept "
                f"as {dtype}"
            )
    return batch.routes


def _needed(tokens: TokenMap, offsets: npt.NDArray[np.int64]) -> dict[int, list[Run]]:
    """Sample -> runs of its rows seen by this rank's routers. Samples without such rows are left out."""
    needed_N = tokens.seen
    begins_N = np.ones(len(needed_N), np.bool_)
    begins_N[1:] = needed_N[1:] != needed_N[:-1]
    begins_N[offsets[:-1]] = True
    begins = np.flatnonzero(begins_N)
    ends = np.append(begins[1:], len(needed_N))
    wanted = needed_N[begins]
    begins, ends = begins[wanted], ends[wanted]
    samples = np.searchsorted(offsets, begins, side="right") - 1
    shift = offsets[samples]
    runs: dict[int, list[Run]] = {}
    for sample, start, end in zip(samples.tolist(), (begins - shift).tolist(), (ends - shift).tolist(), strict=True):
        runs.setdefault(sample, []).append((start, end))
    return runs
