"""FSDP2: rows replayed and recorded by its routers, and their audit."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fsdp2_cases import RECOMPUTE, Gangs, fsdp2, raw_gradients
from megatron_cases import (
    LAYERS,
    TOP_K,
    Case,
    Reference,
    at_rest,
    exported,
    gradients,
    largest_difference,
    make_batch,
    open_strategy,
    read_weights,
    run_case,
    shard,
)

from roll_r3.batch.batch import Batch
from roll_r3.batch.routes import RoutedExperts
from roll_r3.errors import ReplayError
from roll_r3.models.facts import read_facts
from roll_r3.strategies.base import ProcessInfo

pytestmark = pytest.mark.integration


# Replay


@pytest.mark.parametrize("size", [1, 2])
def test_rows_that_the_engine_never_saw_fall_back_to_the_live_router(size: int, gang: Gangs, tiny_moe: Path) -> None:
    batch = make_batch(unknown=0.3)
    unknown = sum(int((~routes.known_R).sum()) for routes in batch.routes)
    case = fsdp2(tiny_moe, layout=RECOMPUTE)

    outcome = gang(size).run(run_case, case, batch)[0]

    wanted = Reference(str(tiny_moe)).gradients(batch, case.config())
    assert largest_difference(gradients(read_weights(tiny_moe), outcome.weights), wanted) < 1e-6
    counts = outcome.train_counts
    known = np.concatenate([routes.known_R for routes in batch.routes])
    assert counts.missing == unknown * LAYERS > 0
    assert counts.trainable == batch.loss_mask_N.sum() * LAYERS
    assert counts.trainable_replayed == (batch.loss_mask_N & known).sum() * LAYERS


@pytest.mark.parametrize("mode", ["R3", "R2"])
@pytest.mark.parametrize("packed", [False, True])
def test_recomputation_changes_no_bit(packed: bool, mode: str, gang: Gangs, models: dict[str, Path]) -> None:
    """Compare gradients with and without recomputation to the last bit, with some rows from the live router."""
    name = "deepseek_v3" if packed else "qwen3_moe"
    batch = make_batch(unknown=0.3, checkpoint=models[name])
    case = fsdp2(models[name], mode=mode, packed=packed, dtype="bf16" if packed else "fp32")

    stored, again = (gang(2).run(raw_gradients, c, batch) for c in (case, replace(case, layout=RECOMPUTE)))

    for one, other in zip(stored, again, strict=True):
        assert one.keys() == other.keys() and one
        assert [parameter for parameter in one if not np.array_equal(one[parameter], other[parameter])] == []


@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize("packed", [False, True])
def test_r2_replays_what_the_pass_before_recorded(packed: bool, size: int, gang: Gangs, tiny_moe: Path) -> None:
    batch = replace(make_batch(), routes=None)
    case = fsdp2(tiny_moe, mode="R2", packed=packed, layout=RECOMPUTE)

    outcome = gang(size).run(run_case, case, batch)[0]

    reference = Reference(str(tiny_moe))
    wanted = reference.gradients(replace(batch, routes=reference.live_routes(batch)), case.config())
    assert largest_difference(gradients(read_weights(tiny_moe), outcome.weights), wanted) < 1e-6
    counts = outcome.train_counts
    assert counts.trainable == counts.trainable_replayed == batch.loss_mask_N.sum() * LAYERS


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("name", ["qwen3_moe", "deepseek_v3", "mixtral"])
@pytest.mark.parametrize("packed", [False, True])
def test_the_first_ratio_under_r2_is_exactly_one(
    packed: bool, name: str, dtype: str, gang: Gangs, models: dict[str, Path]
) -> None:
    """Cut both passes alike: the pass with gradients then repeats every bit of the pass without."""
    batch = replace(make_batch(checkpoint=models[name]), routes=None)
    case = fsdp2(models[name], mode="R2", packed=packed, dtype=dtype, layout=RECOMPUTE)
    case = replace(case, infer_batch_size=case.micro_batch_size, role={"sequence_length_round": 3})
    assert gang(2).run(_first_ratios, case, batch) == [(1, 1)] * 2


def _first_ratios(process: ProcessInfo, case: Case, batch: Batch) -> tuple[float, float]:
    """Return (smallest, largest) ratio of a first step with both passes cut alike."""
    strategy = open_strategy(process, case)
    part = shard(batch, process.rank, process.world_size)
    part = replace(part, old_log_probs_N=strategy.compute_log_probs(part).log_probs_N)
    # replay must not use these weights: their own choices would differ
    metrics = strategy.train_step(part, step=1).metrics
    with pytest.raises(ReplayError, match="were not in it"):
        strategy.train_step(replace(part, sample_ids=tuple(f"other{i}" for i in range(part.num_samples))), step=2)
    strategy.close()
    return metrics["actor/ratio_min"], metrics["actor/ratio_max"]


def test_r2_rows_follow_their_sample_to_another_rank(gang: Gangs, tiny_moe: Path) -> None:
    batch, case = replace(make_batch(), routes=None), fsdp2(tiny_moe, mode="R2")
    stay, move = (gang(2).run(_recorded_then_trained, case, batch, moved) for moved in (False, True))
    assert largest_difference(stay[0], move[0]) < 1e-6


def _recorded_then_trained(process: ProcessInfo, case: Case, batch: Batch, moved: bool) -> dict[str, np.ndarray]:
    strategy = open_strategy(process, case)
    with torch.no_grad():
        strategy.compute_log_probs(shard(batch, process.rank ^ moved, 2))
        for router in strategy.backend.model.routers:  # routes of their own would now be others
            router.module.weight.neg_()
    counts = strategy.train_step(shard(batch, process.rank, 2), step=1).replay
    assert counts.trainable_replayed == counts.trainable > 0
    weights = dict(exported(strategy))
    strategy.close()
    return weights


# The audit


@pytest.mark.parametrize(
    ("size", "mode", "name", "fields", "passes"),
    [
        (1, "R3", "qwen3_moe", {}, 1),
        (2, "R3", "deepseek_v3", {"packed": True, "layout": RECOMPUTE}, 2),
        (2, "R2", "mixtral", {"layout": RECOMPUTE, "role": {"sequence_length_round": 3}}, 2),
    ],
)
def test_every_token_went_where_its_row_says(
    size: int, mode: str, name: str, fields: dict[str, Any], passes: int, gang: Gangs, models: dict[str, Path]
) -> None:
    """Audit steps 1 and 3, two mini-batches each; rows unknown to the engine are left out."""
    batch = make_batch(unknown=0.3 if mode == "R3" else 0, checkpoint=models[name])
    role = {**fields.pop("role", {}), "router_replay": {"mode": mode, "audit": True, "audit_every": 2}}
    case = fsdp2(models[name], mode=mode, micro_batch_size=1, mini_batches=2, role=role, **fields)
    audited, hooks = gang(size).run(_audited_steps, case, batch)[0]
    known = int(batch.lengths_n.sum()) if mode == "R2" else sum(int(r.known_R.sum()) for r in batch.routes)
    wanted = known * len(read_facts(models[name]).moe_layers) * passes
    assert audited == [(wanted, wanted), (0, 0), (wanted, wanted)]
    assert hooks == 0


def _audited_steps(process: ProcessInfo, case: Case, batch: Batch) -> tuple[list[tuple[int, int]], int]:
    strategy = open_strategy(process, case)
    part = shard(batch, process.rank, process.world_size)
    audited = []
    for step in (1, 2, 3):
        if case.mode == "R2":
            strategy.compute_log_probs(part)
        counts = strategy.train_step(part, step=step).replay
        audited.append((counts.audited, counts.audit_equal))
    hooks = _hooks_on_experts(strategy)
    strategy.close()
    return audited, hooks


def _hooks_on_experts(strategy: Any) -> int:
    layers = strategy.backend.model.module.model.layers
    return sum(len(layers[router.layer].mlp.experts._forward_pre_hooks) for router in strategy.backend.model.routers)


def test_the_audit_names_what_went_wrong(gang: Gangs, tiny_moe: Path) -> None:
    role = {"router_replay": {"mode": "R3", "audit": True}}
    first, second = gang(2).run(_audited_mistakes, fsdp2(tiny_moe, layout=RECOMPUTE, role=role), make_batch())
    assert first == second, "every rank raises, and says the same"


def _audited_mistakes(process: ProcessInfo, case: Case, batch: Batch) -> list[str]:
    from roll_r3.replay.layer import LayerReplay
    from roll_r3.replay.session import ReplaySession
    from roll_r3.trainers.fsdp2.audit import ExpertsAudit

    strategy = open_strategy(process, case)
    part = shard(batch, process.rank, process.world_size)
    before = dict(exported(strategy))
    laid_out, recompute, enter = ReplaySession._laid_out, LayerReplay._recompute, ExpertsAudit.__enter__
    found = []

    def shifted(*args: Any) -> Any:
        ids_LtK, known_t = laid_out(*args)
        return ids_LtK.roll(1, 1), known_t

    def shifted_in_backward(layer: Any) -> torch.Tensor:
        return recompute(layer).roll(1, 0)

    def overlook_layer_2(audit: Any) -> Any:
        audit._experts.pop(2)
        return enter(audit)

    for owner, name, wrong, said in (
        (ReplaySession, "_laid_out", shifted, r"position \d+ \(forward\): recorded experts"),
        (LayerReplay, "_recompute", shifted_in_backward, r"position \d+ \(recomputed in backward\): recorded"),
        (ReplaySession, "_padding_rows", lambda session, n: np.zeros((n, TOP_K), np.int64), r"no row, to 1 distinct"),
        (ExpertsAudit, "__enter__", overlook_layer_2, "layer 2 dispatched 0 times instead of 4"),
    ):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(owner, name, wrong)
            with pytest.raises(ReplayError, match=said) as error:
                strategy.train_step(part, step=1)
        found.append(str(error.value))
    assert _hooks_on_experts(strategy) == 0
    assert largest_difference(before, dict(exported(strategy))) == 0, "no weight learns from a wrong route"
    strategy.close()
    return found


# Wrong routes


def test_wrong_routes_are_refused(gang: Gangs, tiny_moe: Path) -> None:
    gang(1).run(_wrong_routes, fsdp2(tiny_moe), make_batch())


def _wrong_routes(process: ProcessInfo, case: Case, batch: Batch) -> None:
    strategy = open_strategy(process, case)
    cut_short = tuple(RoutedExperts(routes.ids_MRK[:, 1:]) for routes in batch.routes)
    one_layer = tuple(RoutedExperts(routes.ids_MRK[:1]) for routes in batch.routes)
    for routes, said in ((None, "carries no routes"), (cut_short, "its .* inputs and this"), (one_layer, "need")):
        wrong = replace(batch, routes=routes)
        with pytest.raises(ReplayError, match=said):
            strategy.compute_log_probs(wrong)
        with pytest.raises(ReplayError, match=said):
            strategy.train_step(wrong, step=1)
        assert at_rest(strategy)
    strategy.close()


def test_wrong_routes_change_the_loss(gang: Gangs, tiny_moe: Path) -> None:
    right, other = make_batch(), make_batch(seed=1, length=20)
    pairs = zip(other.routes, right.routes, strict=True)
    wrong = replace(right, routes=tuple(RoutedExperts(o.ids_MRK[:, : r.num_rows]) for o, r in pairs))
    losses = [gang(1).run(run_case, fsdp2(tiny_moe), b)[0].metrics["actor/loss"] for b in (right, wrong)]
    assert abs(losses[0] - losses[1]) > 1e-2
