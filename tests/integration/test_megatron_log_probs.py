"""Log-probabilities against transformers, the reference role beside the actor, and weights out and back in."""

from __future__ import annotations

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
    assert_load,
    largest_difference,
    make_batch,
    read_weights,
    run_case,
    shard,
)

from roll_r3.batch.batch import Batch
from roll_r3.strategies.base import ProcessInfo

pytestmark = pytest.mark.integration
Gangs = Callable[[int], Gang]

TP2 = {"tensor_model_parallel_size": 2}
EP2 = {"expert_model_parallel_size": 2}
PIPELINE = {**INTERLEAVED, **FULL_RECOMPUTE}


@pytest.mark.parametrize(
    ("size", "layout", "packed"),
    [
        (1, {}, False),
        (1, {}, True),
        (2, TP2, True),
        (2, {"context_parallel_size": 2}, False),
        (2, {"context_parallel_size": 2}, True),
        (2, PIPELINE, False),  # 3 micro-batches: one is repeated to fill the interleaved schedule
        (2, {**EP2, "moe_token_dispatcher_type": "allgather"}, True),
    ],
)
@pytest.mark.parametrize("mode", ["disable", "R3"])
def test_log_probs_and_entropies(mode: str, size: int, layout: dict, packed: bool, gang: Gangs, tiny_moe: Path) -> None:
    batch = make_batch(unknown=0.1)
    case = Case(str(tiny_moe), layout, mode, packed, log_probs_first=True)
    ranks = size // case.model_parallel_size

    outcomes = gang(size).run(run_case, case, batch)

    reference = Reference(str(tiny_moe))
    returned = [outcome for outcome in outcomes if outcome.log_probs is not None]
    assert [outcome.dp_rank for outcome in returned] == list(range(ranks))
    for outcome in returned:
        part = shard(batch, outcome.dp_rank, ranks)
        log_probs, entropies = (x.detach().numpy() for x in reference.tokens(part, replay=mode == "R3"))
        worst = np.abs(outcome.log_probs - log_probs).max(), np.abs(outcome.entropy - entropies).max()
        print(f"{mode} {layout} packed={packed}: log-probabilities {worst[0]:.1e}, entropies {worst[1]:.1e}")
        assert max(worst) < 1e-5
    if mode == "disable":
        assert outcomes[0].log_prob_counts is None
        return
    counts = outcomes[0].log_prob_counts
    known = np.concatenate([routes.known_R for routes in batch.routes])
    live = np.concatenate([r.ids_MRK for r in reference.live_routes(batch, replay=True)], axis=1)
    replayed = np.concatenate([r.ids_MRK for r in batch.routes], axis=1)
    same = (np.sort(live) == np.sort(replayed)).all(-1) & known
    assert counts.compared == known.sum() * LAYERS
    assert counts.agreed == same.sum() > 0
    assert counts.missing == (~known).sum() * LAYERS
    assert_load(outcomes[0].load, [replayed[:, known], live[:, known]])


def test_replaying_the_live_choice_agrees_everywhere(gang: Gangs, tiny_moe: Path) -> None:
    batch = make_batch()
    batch = replace(batch, routes=Reference(str(tiny_moe)).live_routes(batch))
    outcome = gang(2).run(run_case, Case(str(tiny_moe), PIPELINE, log_probs_first=True), batch)[0]
    counts = outcome.log_prob_counts
    assert counts.agreed == counts.compared == batch.lengths_n.sum() * LAYERS
    assert 0 < outcome.seconds_in_routes < 5


def test_the_reference_beside_the_actor_is_untouched(gang: Gangs, tiny_moe: Path) -> None:
    case = Case(str(tiny_moe), PIPELINE, training={"learning_rate": 1e-2}, options={"use_kl_loss": True})
    gang(2).run(_reference_beside_actor, case, make_batch())


def _reference_beside_actor(process: ProcessInfo, case: Case, batch: Batch) -> None:
    from megatron.core.transformer.moe.router_replay import RouterReplay

    from roll_r3.replay.session import ReplaySession
    from roll_r3.trainers.megatron.strategy import MegatronInfer, MegatronTrain

    actor = MegatronTrain(case.view(), process)
    frozen = MegatronInfer(case.view(name="reference"), process)
    for strategy in (actor, frozen):
        strategy.initialize()
    assert RouterReplay.global_router_replay_instances == []
    frozen_routers = [router.module for chunk in frozen.backend.model.routers for router in chunk]
    assert len(frozen_routers) == LAYERS // 2
    seen = []
    with pytest.MonkeyPatch.context() as patch:
        stage = ReplaySession.stage

        def spy(session, chunk, micro):
            stage(session, chunk, micro)
            seen.append(all(router.router_replay is None for router in frozen_routers))

        patch.setattr(ReplaySession, "stage", spy)
        before = frozen.compute_log_probs(batch)
        actor_before = actor.compute_log_probs(batch)
        actor.train_step(batch, step=1)
        after = frozen.compute_log_probs(batch)
        actor_after = actor.compute_log_probs(batch)
    assert seen and all(seen)
    assert before.replay is None and before.seconds_in_routes == 0
    if frozen.returns_results:
        assert np.array_equal(before.log_probs_N, after.log_probs_N)
        assert np.abs(actor_before.log_probs_N - actor_after.log_probs_N).max() > 1e-2
        assert np.abs(before.log_probs_N - actor_before.log_probs_N).max() > 1e-2  # the actor replays
    actor.close()
    frozen.close()


@pytest.mark.parametrize(
    ("size", "layout"),
    [(1, {}), (2, {**PIPELINE, "use_distributed_optimizer": True}), (2, {**EP2, "use_distributed_optimizer": True})],
)
def test_a_saved_checkpoint_is_the_trained_policy(
    size: int, layout: dict, gang: Gangs, tiny_moe: Path, tmp_path: Path
) -> None:
    batch = make_batch()
    case = Case(str(tiny_moe), layout, "disable", mini_batches=2, training={"learning_rate": 1e-2})
    if layout.get("virtual_pipeline_model_parallel_size"):
        case = replace(case, mini_batches=2, micro_batch_size=1)
    outcomes = gang(size).run(_train_and_save, case, batch, tmp_path / "saved")

    reference = Reference(str(tmp_path / "saved"))
    for log_probs, part in outcomes:
        if log_probs is not None:
            wanted = reference.tokens(part, replay=False)[0].detach().numpy()
            assert np.abs(log_probs - wanted).max() < 1e-5
    assert largest_difference(read_weights(tmp_path / "saved"), read_weights(tiny_moe)) > 1e-3
    from transformers import AutoTokenizer

    assert AutoTokenizer.from_pretrained(tmp_path / "saved").decode([72]) != ""


def _train_and_save(process: ProcessInfo, case: Case, batch: Batch, path: Path):
    from roll_r3.trainers.megatron.strategy import MegatronTrain

    strategy = MegatronTrain(case.view(process.world_size // case.model_parallel_size), process)
    strategy.initialize()
    part = shard(batch, strategy.data_parallel_rank, strategy.data_parallel_size)
    strategy.train_step(part, step=1)
    log_probs = strategy.compute_log_probs(part).log_probs_N
    strategy.save_hf(path)
    strategy.close()
    return log_probs, part
