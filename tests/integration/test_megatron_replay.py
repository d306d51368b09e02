"""Routing session in real schedules: exact, complete, and without residue."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from distributed import Gang
from megatron_cases import (
    FULL_RECOMPUTE,
    INTERLEAVED,
    LAYERS,
    Case,
    Reference,
    gradients,
    largest_difference,
    make_batch,
    read_weights,
    run_case,
    shard,
)

from roll_r3.batch.batch import Batch
from roll_r3.batch.routes import RoutedExperts
from roll_r3.errors import ReplayError
from roll_r3.strategies.base import ProcessInfo

pytestmark = pytest.mark.integration
Gangs = Callable[[int], Gang]

PIPELINE = {**INTERLEAVED, **FULL_RECOMPUTE}
TWO_STAGES = {"pipeline_model_parallel_size": 2, **FULL_RECOMPUTE}


def test_wrong_routes_change_the_loss(gang: Gangs, tiny_moe: Path) -> None:
    case = Case(str(tiny_moe), PIPELINE)
    right, wrong = make_batch(), replace(make_batch(), routes=make_batch(seed=1, length=20).routes)
    wrong = replace(
        wrong,
        routes=tuple(
            RoutedExperts(w.ids_MRK[:, : r.num_rows]) for w, r in zip(wrong.routes, right.routes, strict=True)
        ),
    )
    losses = [gang(2).run(run_case, case, batch)[0].metrics["actor/loss"] for batch in (right, wrong)]
    assert abs(losses[0] - losses[1]) > 1e-2


@pytest.mark.parametrize("layout", [PIPELINE, TWO_STAGES, {**TWO_STAGES, "recompute_method": "block"}])
def test_a_log_prob_pass_before_leaves_nothing_for_backward(layout: dict, gang: Gangs, tiny_moe: Path) -> None:
    """Guard against a row left by the previous pass: backward would take it first and give a wrong gradient."""
    batch = make_batch()
    case = Case(str(tiny_moe), layout)

    fresh = gang(2).run(run_case, case, batch)[0]
    after_a_pass = gang(2).run(run_case, replace(case, log_probs_first=True), batch)[0]

    assert largest_difference(fresh.weights, after_a_pass.weights) == 0


@pytest.mark.parametrize("size", [1, 2])
def test_rows_that_the_engine_never_saw_fall_back_to_the_live_router(size: int, gang: Gangs, tiny_moe: Path) -> None:
    batch = make_batch(unknown=0.3)
    unknown = sum(int((~routes.known_R).sum()) for routes in batch.routes)
    case = Case(str(tiny_moe), PIPELINE if size == 2 else FULL_RECOMPUTE)

    outcome = gang(size).run(run_case, case, batch)[0]

    wanted = Reference(str(tiny_moe)).gradients(batch, case.config())
    assert largest_difference(gradients(read_weights(tiny_moe), outcome.weights), wanted) < 1e-6
    counts = outcome.train_counts
    known = np.concatenate([routes.known_R for routes in batch.routes])
    assert counts.missing == unknown * LAYERS > 0
    assert counts.trainable == batch.loss_mask_N.sum() * LAYERS
    assert counts.trainable_replayed == (batch.loss_mask_N & known).sum() * LAYERS


RECOMPUTE = {
    "moe": {"recompute_granularity": "selective", "recompute_modules": ("moe",)},
    "uniform": FULL_RECOMPUTE,
    "block": {**FULL_RECOMPUTE, "recompute_method": "block"},
}


@pytest.mark.parametrize("mode", ["R3", "R2"])
@pytest.mark.parametrize(
    ("size", "layout"),
    [
        (1, {}),
        (2, INTERLEAVED),
        (2, {"tensor_model_parallel_size": 2}),
        (2, {"expert_model_parallel_size": 2}),
        (2, {"context_parallel_size": 2}),
    ],
)
def test_recomputation_changes_no_bit(size: int, layout: dict, mode: str, gang: Gangs, tiny_moe: Path) -> None:
    """Compare gradients with and without recomputation to the last bit, with some rows from the live router."""
    batch = make_batch(unknown=0.3)
    case = Case(str(tiny_moe), layout, mode, packed=bool(layout))

    stored = gang(size).run(_raw_gradients, case, batch)
    for name, settings in RECOMPUTE.items():
        again = gang(size).run(_raw_gradients, replace(case, layout={**layout, **settings}), batch)
        for rank, (one, other) in enumerate(zip(stored, again, strict=True)):
            assert one.keys() == other.keys() and one
            wrong = [parameter for parameter in one if not np.array_equal(one[parameter], other[parameter])]
            assert wrong == [], f"recompute {name}, rank {rank}"


def _raw_gradients(process: ProcessInfo, case: Case, batch: Batch) -> dict[str, np.ndarray]:
    """Return the gradients seen by the optimizer: fp32, after all reductions."""
    strategy = _strategy(process, case)
    part = shard(batch, strategy.data_parallel_rank, strategy.data_parallel_size)
    if case.mode == "R2":
        strategy.compute_log_probs(part)
    found = {}
    step = strategy.backend.optimizer.step

    def keep_then_step(norm):
        for number, chunk in enumerate(strategy.backend.model.chunks):
            for name, parameter in chunk.named_parameters():
                found[f"{number}.{name}"] = parameter.main_grad.numpy().copy()
        return step(norm)

    strategy.backend.optimizer.step = keep_then_step
    strategy.train_step(part, step=1)
    strategy.close()
    return found


# R2


@pytest.mark.parametrize(
    ("size", "layout", "packed"),
    [
        (1, FULL_RECOMPUTE, False),
        (2, PIPELINE, True),
        (2, {"tensor_model_parallel_size": 2}, False),
        (2, {"context_parallel_size": 2}, True),
        (2, {"expert_model_parallel_size": 2, **FULL_RECOMPUTE}, False),
    ],
)
def test_r2_replays_the_recording_pass(size: int, layout: dict, packed: bool, gang: Gangs, tiny_moe: Path) -> None:
    """Run two epochs; the second one's weights would route differently, but must not."""
    reference = Reference(str(tiny_moe))
    batch = replace(make_batch(), routes=None)
    recorded = replace(batch, routes=reference.live_routes(batch))
    training = {"learning_rate": 1e-2, "adam_epsilon": 1e-2, "max_grad_norm": 1.0}
    case = Case(str(tiny_moe), layout, "R2", packed, training=training, options={"ppo_epochs": 2})

    outcome = gang(size).run(run_case, case, batch)[0]

    wanted = reference.train([recorded, recorded], case.config())
    native = Reference(str(tiny_moe)).train([batch, batch], case.config(), replay=False)
    difference = largest_difference(outcome.weights, wanted)
    print(f"R2 {layout}: {difference:.1e}; routing natively {largest_difference(native, wanted):.1e}")
    assert difference < 5e-6
    assert largest_difference(native, wanted) > 1e-3
    assert outcome.log_prob_counts is None  # the recording pass routes natively
    assert outcome.train_counts.trainable_replayed == outcome.train_counts.trainable > 0


ALIKE = {"infer_batch_size": 2, "micro_batch_size": 2}
"""Equal composition of micro-batches in the recording pass and the update, for equal arithmetic."""
DYNAMIC = {
    "infer_batch_size": None,
    "role": {
        f"{name}_in_{way}": value
        for way in ("train", "infer")
        for name, value in {"use_dynamic_batching": True, "max_tokens_per_microbatch": 64}.items()
    },
}


@pytest.mark.parametrize(
    ("size", "case"),
    [
        (1, {"layout": FULL_RECOMPUTE, **ALIKE}),
        (1, {"packed": True, **DYNAMIC}),
        (2, {"layout": TWO_STAGES, "dtype": "bf16", **ALIKE}),
        (2, {"layout": PIPELINE, "packed": True, **ALIKE}),
        (2, {"layout": {"tensor_model_parallel_size": 2}, **ALIKE}),
        (2, {"layout": {"context_parallel_size": 2, **FULL_RECOMPUTE}, "packed": True, **ALIKE}),
        (2, {"layout": {"expert_model_parallel_size": 2}, **DYNAMIC}),
    ],
)
def test_r2_first_ratio_is_exactly_one(size: int, case: dict, gang: Gangs, tiny_moe: Path) -> None:
    gang(size).run(_exact_ratio, Case(str(tiny_moe), mode="R2", **case), make_batch())


def _exact_ratio(process: ProcessInfo, case: Case, batch: Batch) -> None:
    import torch.distributed as dist

    strategy = _strategy(process, case)
    part = shard(batch, strategy.data_parallel_rank, strategy.data_parallel_size)
    found = [(strategy.data_parallel_rank, strategy.compute_log_probs(part).log_probs_N)] * process.world_size
    dist.all_gather_object(found, found[process.rank])
    own = next(values for rank, values in found if rank == strategy.data_parallel_rank and values is not None)
    metrics = strategy.train_step(replace(part, old_log_probs_N=own), step=1).metrics
    assert metrics["actor/ratio_max"] == metrics["actor/ratio_min"] == 1.0
    strategy.close()


def test_r2_needs_a_recording_pass_over_the_same_samples(gang: Gangs, tiny_moe: Path) -> None:
    gang(1).run(_refuses_unrecorded, Case(str(tiny_moe), mode="R2"), make_batch())


def _refuses_unrecorded(process: ProcessInfo, case: Case, batch: Batch) -> None:
    strategy = _strategy(process, case)
    with pytest.raises(ReplayError, match="8 of 8 samples were not in it"):
        strategy.train_step(batch, step=1)
    strategy.compute_log_probs(batch)
    strategy.train_step(batch, step=1)
    renamed = replace(batch, sample_ids=tuple(f"next{i}" for i in range(8)))
    strategy.compute_log_probs(renamed)
    with pytest.raises(ReplayError, match="the first is sample0"):  # dropped by the next recording pass
        strategy.train_step(batch, step=2)
    strategy.close()


# Failures: each has a message, and leaves nothing behind


def test_r3_without_routes_is_refused(gang: Gangs, tiny_moe: Path) -> None:
    gang(1).run(_refuses_without_routes, Case(str(tiny_moe)), make_batch())


def _refuses_without_routes(process: ProcessInfo, case: Case, batch: Batch) -> None:
    strategy = _strategy(process, case)
    for call in (strategy.compute_log_probs, lambda b: strategy.train_step(b, step=1)):
        with pytest.raises(ReplayError, match="the batch carries no routes"):
            call(replace(batch, routes=None))
    strategy.close()


def test_a_failing_schedule_leaves_no_residue(gang: Gangs, tiny_moe: Path) -> None:
    """Fail in five ways in the middle of a step; a good step afterwards is unaffected."""
    case = Case(str(tiny_moe), FULL_RECOMPUTE)
    wanted = gang(1).run(run_case, case, make_batch())[0].weights
    found = gang(1).run(_fail_then_train, case, make_batch())[0]
    assert largest_difference(found, wanted) == 0


def _fail_then_train(process: ProcessInfo, case: Case, batch: Batch) -> dict:
    from megatron.core.transformer.moe.router_replay import RouterReplay
    from megatron_cases import exported

    from roll_r3.replay import session as replay
    from roll_r3.trainers.megatron import schedule

    strategy = _strategy(process, case)
    routers = [router for chunk in strategy.backend.model.routers for router in chunk]
    assert [router.layer for router in routers] == list(range(LAYERS))

    def at_rest() -> bool:
        return all(router.module.router_replay is None for router in routers)

    def fails(match: str, error: type[Exception] = ReplayError, with_batch: Batch = batch) -> None:
        with pytest.raises(error, match=match):
            strategy.train_step(with_batch, step=1)
        assert at_rest()
        assert RouterReplay.global_router_replay_instances == []

    short = replace(batch, routes=(RoutedExperts(batch.routes[0].ids_MRK[:, 1:]), *batch.routes[1:]))
    fails("the routes of sample sample0 are", with_batch=short)

    with pytest.MonkeyPatch.context() as patch:  # the model computes, then the loss fails in the third micro-batch
        calls = []

        def third_fails(*args):
            calls.append(args)
            if len(calls) == 3:
                raise ZeroDivisionError("in the third micro-batch")
            return original(*args)

        original = schedule._loss
        patch.setattr(schedule, "_loss", third_fails)
        fails("in the third micro-batch", ZeroDivisionError)

    stage = replay.ReplaySession.stage
    with pytest.MonkeyPatch.context() as patch:  # one router is never asked

        def skip_layer_2(session, chunk, micro):
            stage(session, chunk, micro)
            routers[2].module.router_replay = None

        patch.setattr(replay.ReplaySession, "stage", skip_layer_2)
        fails("the router of layer 2 did not consume its rows")

    with pytest.MonkeyPatch.context() as patch:  # rows for fewer tokens than seen by the router

        def two_rows_short(session, chunk, micro):
            stage(session, chunk, micro)
            for layer in session.layers[chunk]:
                layer.rows = replace(layer.rows, ids_tK=layer.rows.ids_tK[:-2])

        patch.setattr(replay.ReplaySession, "stage", two_rows_short)
        fails("but its rows are")

    with pytest.MonkeyPatch.context() as patch:  # rows are queued, but backward does not recompute
        patch.setattr(strategy.backend.model.config, "recompute_granularity", None)
        fails("backward did not recompute the router of layer 0")

    with pytest.MonkeyPatch.context() as patch:  # backward recomputes, though nothing was queued
        patch.setitem(vars(strategy.backend.model), "routers", [[replace(r, recomputed=False) for r in routers]])
        fails("the router of layer 3 ran outside a micro-batch")

    strategy.train_step(batch, step=1)
    assert at_rest()
    weights = dict(exported(strategy))
    strategy.close()
    return weights


@pytest.mark.parametrize("layout", [PIPELINE, TWO_STAGES])
@pytest.mark.parametrize("mistake", ["newest first", "the forward's own"])
def test_a_wrong_queue_shows_in_a_pipeline(mistake: str, layout: dict, gang: Gangs, tiny_moe: Path) -> None:
    """Negative control: with two stages these tests distinguish the right row from the wrong one."""
    batch = make_batch(length=12)
    case = Case(str(tiny_moe), layout)

    right = gang(2).run(run_case, case, batch)[0]
    wrong = gang(2).run(_with_mistake, mistake, case, batch)[0]

    difference = largest_difference(
        gradients(read_weights(tiny_moe), right.weights), gradients(read_weights(tiny_moe), wrong.weights)
    )
    print(f"{mistake}: gradients off by {difference:.1e}")
    assert difference > 1e-3


def _with_mistake(process: ProcessInfo, mistake: str, case: Case, batch: Batch):
    from roll_r3.replay.session import LayerReplay

    def newest_first(layer):
        return layer.queue.pop()

    def own_of_forward(layer):
        newest = layer.queue[-1]
        layer.queue = deque(list(layer.queue)[1:])
        return newest

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LayerReplay, "_recompute", newest_first if mistake == "newest first" else own_of_forward)
        return run_case(process, case, batch)


def _strategy(process: ProcessInfo, case: Case):
    from roll_r3.trainers.megatron.strategy import MegatronTrain

    strategy = MegatronTrain(case.view(process.world_size // case.model_parallel_size), process)
    strategy.initialize()
    return strategy
