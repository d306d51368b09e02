"""Routes through Ray's object store on two real nodes: read in place, cut on their node, never held by the driver."""

from __future__ import annotations

import pickle
from dataclasses import replace
from pathlib import Path
from typing import Any
from uuid import uuid4

import numpy as np
import pytest
import ray
from ray.cluster_utils import Cluster
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from roll_r3.batch.batch import Batch
from roll_r3.batch.route_pieces import RouteRequest, read_held
from roll_r3.batch.routes import RoutedExperts
from roll_r3.batch.trajectory import Trajectory
from roll_r3.batch.wire import EncodedGroup
from roll_r3.cluster import transport
from roll_r3.cluster.transport import StoredRoutes, read_routes, store_routes
from roll_r3.errors import LostWorkerError, RouteError

pytestmark = pytest.mark.integration

LAYERS, ROWS, PROMPT, TOP_K, EXPERTS, SAMPLES = 8, 4000, 1000, 4, 64, 3


def trajectories() -> list[Trajectory]:
    rng = np.random.default_rng(0)
    prompt = rng.integers(0, EXPERTS, (LAYERS, PROMPT, TOP_K)).astype(np.uint8)
    out = []
    for i in range(SAMPLES):
        own = rng.integers(0, EXPERTS, (LAYERS, ROWS - PROMPT, TOP_K)).astype(np.uint8)
        routes = RoutedExperts(
            np.concatenate([prompt, own], axis=1), (np.arange(ROWS) < PROMPT) | (np.arange(ROWS) % 7 != i)
        )
        tokens = np.arange(ROWS + 1, dtype=np.int32)
        out.append(
            Trajectory.one_turn(
                f"s{i}",
                "group",
                prompt_ids=tokens[:PROMPT],
                response_ids=tokens[PROMPT:],
                log_probs=np.zeros(ROWS + 1 - PROMPT, np.float32),
                version=0,
                finish_reason="stop",
                routes=routes,
            )
        )
    return out


class Engine:
    """Actor storing routes on its own node, like a rollout worker."""

    def store(self) -> Any:
        return store_routes(trajectories(), EXPERTS)

    def cut_routes(self, requests: Any) -> Any:
        return transport.cut(requests)

    def store_damaged(self) -> Any:
        stored = store_routes(trajectories(), EXPERTS)
        damaged = np.array(ray.get(stored[0].routes.ref))
        damaged[-1] ^= 1
        assert EncodedGroup(damaged).num_samples == SAMPLES, "only the ids are damaged"
        self.ref = ray.put(damaged)
        return [replace(t, routes=replace(t.routes, ref=self.ref)) for t in stored]


class Rank:
    """Actor reading a stage's layers and a slice of each sample, like a rank of a trainer."""

    def read(self, batch: Batch, layers: range, runs: Any) -> Any:
        """Return the answers, and the size of each received parcel in bytes."""
        sizes = []
        unpack = transport.unpack

        def weighed(requests: Any, parcel: Any) -> Any:
            sizes.append(parcel.nbytes)
            return unpack(requests, parcel)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(transport, "unpack", weighed)
            return read_routes([RouteRequest(r, layers, runs) for r in batch.routes]), sizes  # type: ignore[union-attr]


@pytest.fixture(scope="module")
def nodes():
    cluster = Cluster()
    first = cluster.add_node(num_cpus=1, object_store_memory=200 << 20, include_dashboard=False)
    here = {"env_vars": {"PYTHONPATH": str(Path(__file__).parent)}}  # workers import this module
    ray.init(address=cluster.address, runtime_env=here, log_to_driver=False, logging_level="ERROR")
    second = cluster.add_node(num_cpus=1, object_store_memory=200 << 20)
    cluster.wait_for_nodes()
    yield cluster, first, second
    ray.shutdown()
    cluster.shutdown()


def on(node: Any, kind: type) -> Any:
    where = NodeAffinitySchedulingStrategy(node.node_id, soft=False)
    return ray.remote(kind).options(num_cpus=1, scheduling_strategy=where, name=uuid4().hex).remote()


RUNS, LAYER_RUN = ((0, 300), (900, 1100), (3500, 4000)), range(2, 6)


def expected() -> list[Any]:
    return read_held([RouteRequest(t.routes, LAYER_RUN, RUNS) for t in trajectories()])


def assert_same(answers: Any) -> None:
    for pieces, wanted in zip(answers, expected(), strict=True):
        assert (
            np.concatenate([p.ids_LRK for p in pieces], axis=1) == np.concatenate([p.ids_LRK for p in wanted], axis=1)
        ).all()
        assert (np.concatenate([p.known_R for p in pieces]) == np.concatenate([p.known_R for p in wanted])).all()


def test_routes_travel_between_nodes_as_what_was_asked_for(nodes):
    _, first, second = nodes
    engine = on(second, Engine)
    stored = ray.get(engine.store.remote())
    handles = [t.routes for t in stored]
    assert all(isinstance(h, StoredRoutes) and h.node_id == second.node_id for h in handles)
    assert len({h.ref for h in handles}) == 1, "one object per prompt"
    whole = sum(t.routes.ids_MRK.nbytes for t in trajectories())  # type: ignore[union-attr]
    assert sum(h.nbytes for h in handles) < 0.9 * whole, "the prompt's rows once"
    batch = Batch.from_trajectories(stored)
    held = [vars(h).copy() for h in handles]
    for fields in held:
        del fields["ref"]  # a reference is counted as an identifier; its bytes belong to Ray
    assert len(pickle.dumps(held)) < 1000 * len(held), "the driver passes handles on"

    rank = on(first, Rank)
    answers, sizes = ray.get(rank.read.remote(batch, LAYER_RUN, RUNS))
    assert_same(answers)
    rows = SAMPLES * sum(end - start for start, end in RUNS)
    assert sizes == [rows * len(LAYER_RUN) * TOP_K + rows], "the ids that were asked for, and which rows are known"
    ray.kill(rank)
    ray.kill(engine)


def test_routes_on_the_own_node_are_read_in_place(nodes):
    _, first, _ = nodes
    engine = on(first, Engine)
    batch = Batch.from_trajectories(ray.get(engine.store.remote()))
    answers = read_routes([RouteRequest(r, LAYER_RUN, RUNS) for r in batch.routes])  # this process is on that node
    assert_same(answers)
    encoded = ray.get(batch.routes[0].ref)
    assert all(np.shares_memory(piece.ids_LRK, encoded) for pieces in answers for piece in pieces)
    assert not any(piece.ids_LRK.flags.writeable for pieces in answers for piece in pieces)
    ray.kill(engine)


def test_routes_that_this_process_holds_are_read_beside_stored_ones(nodes):
    _, first, _ = nodes
    engine = on(first, Engine)
    stored = ray.get(engine.store.remote())
    mixed = [trajectories()[0].routes, stored[1].routes, stored[2].routes]
    assert_same(read_routes([RouteRequest(r, LAYER_RUN, RUNS) for r in mixed]))
    ray.kill(engine)


def test_damaged_routes_are_refused_wherever_they_lie(nodes):
    _, first, second = nodes
    for node in (first, second):
        engine = on(node, Engine)
        stored = ray.get(engine.store_damaged.remote())
        last = [RouteRequest(stored[2].routes, range(LAYERS - 1, LAYERS), RUNS)]
        with pytest.raises(RouteError, match="checksum of sample 2 in MoE layer 7 is wrong"):
            read_routes(last)
        ray.kill(engine)


def test_routes_of_a_node_that_went_are_said_to_be_lost(nodes):
    cluster, _, _ = nodes
    third = cluster.add_node(num_cpus=1, object_store_memory=100 << 20)
    cluster.wait_for_nodes()
    stored = ray.get(on(third, Engine).store.remote())
    cluster.remove_node(third, allow_graceful=False)
    with pytest.raises(LostWorkerError, match="routes are lost, since the process that stored them ended"):
        read_routes([RouteRequest(t.routes, LAYER_RUN, RUNS) for t in stored])


def test_routes_of_an_engine_that_died_are_said_to_be_lost(nodes):
    _, _, second = nodes
    engine = on(second, Engine)
    stored = ray.get(engine.store.remote())
    ray.kill(engine)
    with pytest.raises(LostWorkerError, match="routes are lost, since the process that stored them ended"):
        read_routes([RouteRequest(t.routes, LAYER_RUN, RUNS) for t in stored])
