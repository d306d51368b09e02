"""Rules of the session, with direct calls of megatron's top-k and no model."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from roll_r3.batch.batch import Batch
from roll_r3.batch.route_pieces import read_held
from roll_r3.batch.routes import RoutedExperts
from roll_r3.batch.token_map import Layout
from roll_r3.errors import ReplayError, RouteError
from roll_r3.models.facts import ModelFacts

EXPERTS, TOP_K, LENGTHS = 8, 2, (3, 5)
FACTS = ModelFacts(
    model_type="test",
    num_layers=6,
    moe_layers=(1, 3, 5),
    num_experts=EXPERTS,
    top_k=TOP_K,
    num_attention_heads=4,
    num_key_value_heads=4,
    vocab_size=32,
    context_length=64,
)
FULL = {"recompute_granularity": "full"}
LAYER_ROWS = {1: 0, 3: 1, 5: 2}


@dataclass
class World:
    """Routers of two chunks (layers 1, 3 and layer 5), and their micro-batches."""

    routers: list[list[Any]]
    micro_batches: list[Any]

    def forward(self, chunk: int, index: int, scores: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Call one router as megatron does."""
        from megatron.core.transformer.moe.moe_utils import topk_routing_with_score_function

        replay = self.routers[chunk][index].module.router_replay
        probs, routing_map = topk_routing_with_score_function(scores, TOP_K, router_replay=replay)
        return probs, routing_map


def _batch(seed: int, known: bool = True) -> Batch:
    rng = np.random.default_rng(seed)
    total = sum(LENGTHS)
    routes = tuple(
        RoutedExperts(
            rng.random((3, n, EXPERTS)).argsort(-1)[..., :TOP_K].astype(np.uint8),
            None if known else np.arange(n) != 1,
        )
        for n in LENGTHS
    )
    return Batch(
        sample_ids=("a", "b"),
        lengths_n=np.array(LENGTHS),
        input_ids_N=np.arange(total),
        labels_N=np.arange(total),
        loss_mask_N=np.arange(total) % 2 == 0,
        rollout_log_probs_N=np.zeros(total, np.float32),
        routes=routes,
    )


def _world(*, recomputed: bool = True, known: bool = True, num_micro_batches: int = 2) -> World:
    from roll_r3.trainers.cutting import cut
    from roll_r3.trainers.megatron.routers import Router

    def router(layer: int) -> Router:
        return Router(SimpleNamespace(router_replay=None), layer, recomputed)

    micro_batches = [cut(_batch(i, known), [np.arange(2)], Layout())[0] for i in range(num_micro_batches)]
    routers = [[router(1), router(3)], [router(5)]]
    return World(routers, _delivered(routers, micro_batches))


def _delivered(routers: list[list[Any]], micro_batches: list[Any]) -> list[Any]:
    from roll_r3.replay.rows import chunk_rows, deliver

    return deliver(micro_batches, chunk_rows(routers, LAYER_ROWS), num_layers=3, facts=FACTS, read=read_held)


def _session(world: World, *, forward_only: bool = False):
    from roll_r3.replay.session import ReplaySession

    return ReplaySession(
        world.routers,
        len(world.micro_batches),
        facts=FACTS,
        ep_size=1,
        device=torch.device("cpu"),
        forward_only=forward_only,
        compares=forward_only,
    )


def _scores(seed: int = 0) -> torch.Tensor:
    return torch.randn(10, EXPERTS, generator=torch.Generator().manual_seed(seed))  # 2 rows of 5, one padded by 2


def _expected_map(batch: Batch, row: int) -> torch.Tensor:
    """Return the routing map of the padded grid, written as loops: position outer, sample inner."""
    from roll_r3.replay.padding import padding_rows

    out = torch.zeros(10, EXPERTS, dtype=torch.bool)
    padding = iter(padding_rows(2, EXPERTS, TOP_K))
    for position in range(5):
        for sample, length in enumerate(LENGTHS):
            ids = batch.routes[sample].ids_MRK[row, position].tolist() if position < length else next(padding).tolist()
            out[position * 2 + sample, ids] = True
    return out


def test_forward_and_recompute_use_the_rows_of_their_micro_batch() -> None:
    world = _world()
    with _session(world) as session:
        forward = {}
        for number, micro in enumerate(world.micro_batches):
            for chunk, layers in enumerate(([1, 3], [5])):
                with session.micro_batch(chunk, micro):
                    for index, layer in enumerate(layers):
                        forward[layer, number] = world.forward(chunk, index, _scores(number))
        for number in range(2):
            for layer, chunk, index in ((5, 1, 0), (3, 0, 1), (1, 0, 0)):
                again = world.forward(chunk, index, _scores(number))
                for a, b in zip(again, forward[layer, number], strict=True):
                    assert torch.equal(a, b)
    for (layer, number), (probs, routing_map) in forward.items():
        batch = world.micro_batches[number].batch
        assert torch.equal(routing_map, _expected_map(batch, LAYER_ROWS[layer]))
        assert torch.allclose(probs.sum(-1), torch.ones(10))
    assert session.counts.trainable == session.counts.trainable_replayed == 2 * 3 * 4
    assert session.counts.padded == 2 * 3 * 2
    assert session.counts.compared == session.counts.agreed == session.counts.missing == 0


@pytest.mark.parametrize(
    ("mistake", "noticed"),
    [
        ("newest first", "another map"),
        ("never backward", "ran outside a micro-batch of its session, or twice"),
        ("the last forward's rows", "backward did not recompute the router of layer"),
    ],
)
def test_negative_control_of_the_order_of_backward(mistake: str, noticed: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Repeat two errors of megatron's own replay: the order of its queue, and an action left at forward."""
    from roll_r3.replay.layer import LayerReplay

    if mistake == "newest first":
        monkeypatch.setattr(LayerReplay, "_recompute", lambda layer: layer.queue.pop())
    elif mistake == "never backward":
        monkeypatch.setattr(LayerReplay, "_recompute", lambda layer: layer._forward(lambda: None))
    else:
        monkeypatch.setattr(LayerReplay, "_recompute", lambda layer: layer.queue[-1])
    with pytest.raises(ReplayError, match=noticed):
        _forwards_then_backwards()


def _forwards_then_backwards() -> None:
    """Run layer 5 as the first stage of a pipeline does; raise ReplayError when a map differs."""
    world = _world()
    world.routers = [[], world.routers[1]]
    with _session(world) as session:
        maps = []
        for micro in world.micro_batches:
            with session.micro_batch(1, micro):
                maps.append(world.forward(1, 0, _scores())[1])
        again = [world.forward(1, 0, _scores())[1] for _ in maps]
    if not all(torch.equal(a, b) for a, b in zip(maps, again, strict=True)):
        raise ReplayError("another map")


def test_rows_do_not_outlive_their_session() -> None:
    """Guard against rows left in a layer by a pass without backward: the next backward would take them first."""
    world = _world(recomputed=True)
    for session in (_session(world, forward_only=True), _session(world, forward_only=True)):
        _run(world, session)
    with pytest.raises(ReplayError, match="backward did not recompute the router of layer 1 for 2 of 2"):
        _run(world, _session(world))  # leaves rows behind, and fails
    with contextlib.suppress(ReplayError), _session(world) as session:
        assert not any(layer.queue or layer.rows for chunk in session.layers for layer in chunk)


def test_unknown_rows_route_natively_and_recompute_repeats_the_choice() -> None:
    world = _world(known=False, num_micro_batches=1)
    (micro,) = world.micro_batches
    with _session(world) as session:
        for chunk, size in ((0, 2), (1, 1)):
            with session.micro_batch(chunk, micro):
                maps = [world.forward(chunk, index, _scores())[1] for index in range(size)]
            # scores with other choices: recompute must not use them
            recomputed = [world.forward(chunk, index, -_scores())[1] for index in range(size)]
            assert all(torch.equal(a, b) for a, b in zip(maps, recomputed, strict=True))
    wanted = _expected_map(micro.batch, 2)
    wanted[2:4] = False
    wanted[2:4] = wanted[2:4].scatter(1, _scores()[2:4].topk(TOP_K).indices, True)  # position 1 of both samples
    assert torch.equal(maps[0], wanted)
    assert session.counts.missing == 3 * 2


def test_agreement_with_the_live_router_is_counted_in_forward_only_passes() -> None:
    world = _world(num_micro_batches=1)
    (micro,) = world.micro_batches
    scores = _scores()
    with _session(world, forward_only=True) as session:
        for chunk, size in ((0, 2), (1, 1)):
            with session.micro_batch(chunk, micro):
                for index in range(size):
                    world.forward(chunk, index, scores)
    live = scores.topk(TOP_K).indices
    agreed = 0
    for row in range(3):
        for position in range(5):
            for sample, length in enumerate(LENGTHS):
                if position < length:
                    recorded = set(micro.batch.routes[sample].ids_MRK[row, position].tolist())
                    agreed += recorded == set(live[position * 2 + sample].tolist())
    assert (session.counts.compared, session.counts.agreed) == (3 * 8, agreed)
    real = torch.from_numpy(micro.tokens.router_slots_t >= 0)
    for row, layer in enumerate((1, 3, 5)):
        replayed = torch.from_numpy(np.concatenate([routes.ids_MRK[row] for routes in micro.batch.routes]))
        wanted = [torch.bincount(ids.flatten(), minlength=EXPERTS) for ids in (replayed, live[real])]
        assert torch.equal(session.loads[layer], torch.stack(wanted))


@pytest.mark.parametrize("mode", ["replay", "record"])
def test_a_bias_that_forces_one_expert_shows_in_the_load_of_its_layer(mode: str) -> None:
    from roll_r3.replay.choice_counts import at_model_layers
    from roll_r3.replay.expert_load import ExpertLoad, load_metrics
    from roll_r3.replay.session import RecordSession

    world = _world()
    repeat = replace(world.micro_batches[1], counted=False)  # fills the schedule
    arguments = {"facts": FACTS, "ep_size": 1, "device": torch.device("cpu")}
    session = _session(world, forward_only=True) if mode == "replay" else RecordSession(world.routers, 2, **arguments)
    with session:
        for micro in (world.micro_batches[0], repeat):
            for chunk, layers in ((0, (1, 3)), (1, (5,))):
                with session.micro_batch(chunk, micro):
                    for index, layer in enumerate(layers):
                        bias = torch.tensor([0, 0, 0, 100.0 * (layer == 3), 0, 0, 0, 0])
                        world.forward(chunk, index, _scores(layer) + bias)
    counts = at_model_layers([session.loads], FACTS.moe_layers, EXPERTS, torch.device("cpu")).numpy()
    sides = {"replay": [3 * 8 * TOP_K] * 2, "record": [0, 3 * 8 * TOP_K]}[mode]
    assert counts.sum((1, 2)).tolist() == sides, "neither padding nor the repeat"
    metrics = load_metrics(ExpertLoad(FACTS.moe_layers, counts))
    assert metrics["expert_load/live/max_share_worst"] == 1 / TOP_K
    assert metrics["expert_load/live/worst_layer"] == 3
    assert metrics["expert_load/live/layer_3"] < 0.8 < metrics["expert_load/live/layer_1"]


def test_without_a_comparison_no_load_is_counted() -> None:
    world = _world(recomputed=False)
    session = _session(world)
    _run(world, session)
    assert session.loads == {}


def test_recording_keeps_the_live_choice_and_places_padding_as_replay_does() -> None:
    from roll_r3.replay.session import RecordSession

    world = _world(num_micro_batches=1)
    (micro,) = world.micro_batches
    session = RecordSession(world.routers, 1, facts=FACTS, ep_size=1, device=torch.device("cpu"))
    with session:
        for chunk, size in ((0, 2), (1, 1)):
            with session.micro_batch(chunk, micro):
                for index in range(size):
                    world.forward(chunk, index, _scores(chunk + index))
    (chosen,) = session.chosen
    real = torch.from_numpy(micro.tokens.router_slots_t >= 0)
    for row, seed in enumerate((0, 1, 1)):
        assert torch.equal(chosen[row][real], _scores(seed).topk(TOP_K).indices[real])
        assert torch.equal(chosen[row][~real], torch.tensor([[0, 1], [2, 3]]))


def test_a_stage_of_dense_layers_records_and_replays_nothing() -> None:
    """Check for rows of the model's shape without layers, like those of other ranks."""
    from roll_r3.replay.recorded import RecordedRoutes
    from roll_r3.replay.session import RecordSession, replaying

    alone = SimpleNamespace(rank=0, size=1, device=torch.device("cpu"), reduce=lambda *args: None)
    world = _world(num_micro_batches=1)
    (micro,) = world.micro_batches
    session = RecordSession([[]], 1, facts=FACTS, ep_size=1, device=torch.device("cpu"))
    with session, session.micro_batch(0, micro):
        pass
    recorded = RecordedRoutes(alone, lambda ids: [(Layout(), ids)], EXPERTS)
    recorded.store([micro], session.chosen)
    batch = recorded.attach(replace(micro.batch, routes=None))
    again, [delivered] = replaying(
        [replace(micro, batch=batch)],
        [[]],
        facts=FACTS,
        ep_size=1,
        device=torch.device("cpu"),
        layer_rows={},
        read=read_held,
        forward_only=False,
        compares=False,
    )
    with again, again.micro_batch(0, delivered):
        pass
    assert again.counts.trainable == 0


def test_sessions_do_not_nest_and_leave_routers_at_rest() -> None:
    world = _world()
    everything = [router.module for chunk in world.routers for router in chunk]

    def interrupted() -> None:
        with _session(world):
            with pytest.raises(ReplayError, match="sessions do not nest"):
                _session(world).__enter__()
            assert all(module.router_replay is not None for module in everything)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert all(module.router_replay is None for module in everything)


def _run(world: World, session: Any, *, skip: int | None = None, twice: int | None = None) -> None:
    with session:
        for micro in world.micro_batches:
            for chunk, layers in enumerate(([1, 3], [5])):
                with session.micro_batch(chunk, micro):
                    for index, layer in enumerate(layers):
                        for _ in range({skip: 0, twice: 2}.get(layer, 1)):
                            world.forward(chunk, index, _scores())


def test_every_row_is_consumed_exactly_once() -> None:
    world = _world(recomputed=False)
    _run(world, _session(world))
    with pytest.raises(ReplayError, match="layer 3 did not consume its rows"):
        _run(world, _session(world), skip=3)
    for recomputed in (False, True):
        world = _world(recomputed=recomputed)
        with pytest.raises(ReplayError, match="layer 5 ran outside a micro-batch of its session, or twice"):
            _run(world, _session(world), twice=5)


def test_a_micro_batch_that_never_ran_is_noticed() -> None:
    world = _world(recomputed=False)
    session = _session(world)
    world.micro_batches.pop()
    with pytest.raises(ReplayError, match="layer 1 consumed 1 micro-batches of 2"):
        _run(world, session)


def test_rows_that_backward_does_not_take_are_noticed() -> None:
    world = _world(recomputed=True)
    with pytest.raises(ReplayError, match="backward did not recompute the router of layer 1 for 2 of 2"):
        _run(world, _session(world))


def test_a_recompute_too_many_is_noticed() -> None:
    world = _world(num_micro_batches=1)
    with _session(world) as session:
        for chunk, size in ((0, 2), (1, 1)):
            with session.micro_batch(chunk, world.micro_batches[0]):
                for index in range(size):
                    world.forward(chunk, index, _scores())
            for index in range(size):
                world.forward(chunk, index, _scores())
        with pytest.raises(ReplayError, match="recomputes the router of layer 5 once more than it ran forward"):
            world.forward(1, 0, _scores())


@pytest.mark.parametrize("tokens", [8, 12])
def test_a_row_count_that_differs_from_the_tokens_is_noticed(tokens: int) -> None:
    world = _world(recomputed=False)
    session = _session(world)
    with pytest.raises(ReplayError, match=rf"routes {tokens} tokens .* rows are \[10, 2\]"):
        _forward_once(world, session, torch.randn(tokens, EXPERTS))


def _forward_once(world: World, session: Any, scores: torch.Tensor) -> None:
    with session, session.micro_batch(1, world.micro_batches[0]):
        world.forward(1, 0, scores)


@pytest.mark.parametrize(
    ("routes", "said"),
    [
        (None, "carries no routes"),
        ((RoutedExperts(np.zeros((3, 2, 2), np.uint8)), RoutedExperts(np.zeros((3, 5, 2), np.uint8))), "sample a are"),
        ((RoutedExperts(np.zeros((3, 3, 2), np.uint8)), RoutedExperts(np.zeros((6, 5, 2), np.uint8))), "sample b are"),
        ((RoutedExperts(np.zeros((3, 3, 4), np.uint8)), RoutedExperts(np.zeros((3, 5, 2), np.uint8))), "sample a are"),
        ((RoutedExperts(np.zeros((3, 3, 2), np.uint8)), RoutedExperts(np.zeros((3, 5, 2), np.uint16))), "b are uint16"),
    ],
)
def test_routes_that_do_not_fit_are_refused(routes: Any, said: str) -> None:
    world = _world()
    micro = replace(world.micro_batches[0], batch=replace(world.micro_batches[0].batch, routes=routes))
    with pytest.raises(ReplayError, match=said):
        _delivered(world.routers, [micro])


def test_routes_that_lie_elsewhere_are_not_guessed() -> None:
    class Elsewhere:
        num_layers, num_rows, top_k, dtype, nbytes = 3, 3, TOP_K, np.dtype(np.uint8), 1

    world = _world()
    there = replace(world.micro_batches[0].batch, routes=(Elsewhere(), world.micro_batches[0].batch.routes[1]))
    with pytest.raises(RouteError, match="does not hold the routes: got a Elsewhere"):
        _delivered(world.routers, [replace(world.micro_batches[0], batch=there)])


def test_rows_that_were_not_delivered_or_are_others_are_noticed() -> None:
    world = _world()
    micro = world.micro_batches[0]
    first, second = micro.routes
    for routes, said in (
        (None, "carries no routes: deliver them first"),
        ((first[1:], second), "has 5 rows in .2. layers, but the 2 routers of this chunk need 8"),
        ((second, first), "has 8 rows in .1. layers, but the 2 routers of this chunk need 8"),
    ):
        with (
            pytest.raises(ReplayError, match=said),
            _session(world) as session,
            session.micro_batch(0, replace(micro, routes=routes)),
        ):
            pass
        assert all(router.module.router_replay is None for chunk in world.routers for router in chunk)


def test_the_pipeline_is_filled_with_repeats_that_do_not_count() -> None:
    from roll_r3.trainers.cutting import fill_up

    world = _world(num_micro_batches=3)
    filled = fill_up(world.micro_batches, 4)
    assert [micro.counted for micro in filled] == [True, True, True, False]
    assert filled[3].batch is world.micro_batches[2].batch
    assert fill_up(filled, 4) == filled
    assert len(fill_up(world.micro_batches[:1], 4)) == 4


@pytest.mark.parametrize(
    ("settings", "recomputed"),
    [
        ({}, [False, False, False]),
        ({**FULL, "recompute_method": "uniform"}, [True, True, True]),
        (
            {**FULL, "recompute_method": "block", "recompute_num_layers": 1},
            [True, False, False],
        ),
        ({"recompute_granularity": "selective", "recompute_modules": ["moe"]}, [True, True, True]),
        ({"recompute_granularity": "selective", "recompute_modules": ["core_attn", "mlp"]}, [False, False, False]),
    ],
)
def test_which_routers_backward_runs_again(settings: dict, recomputed: list[bool]) -> None:
    from roll_r3.trainers.megatron.routers import recomputes_router

    names = ("recompute_granularity", "recompute_method", "recompute_num_layers", "recompute_modules")
    config = SimpleNamespace(**{name: settings.get(name) for name in names})
    assert [recomputes_router(config, index) for index in range(3)] == recomputed
