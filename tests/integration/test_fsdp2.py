"""The FSDP2 trainer: against transformers one sample at a time, against Megatron, and against itself."""

from __future__ import annotations

import gc
import re
from collections.abc import Callable
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from distributed import Gang, RankFailed
from megatron_cases import (
    LAYERS,
    SAMPLES,
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
from own_code import with_code_of_its_own
from safetensors.torch import load_file, save_file
from torch.distributed.tensor import DTensor

from roll_r3.batch.batch import Batch
from roll_r3.batch.routes import RoutedExperts
from roll_r3.errors import ConfigError, ReplayError, RollError
from roll_r3.models.facts import read_facts
from roll_r3.models.tiny import TINY_MODELS, make_tiny_checkpoint
from roll_r3.strategies.base import ProcessInfo
from roll_r3.strategies.train import world

pytestmark = pytest.mark.integration
Gangs = Callable[[int], Gang]

RECOMPUTE = {"recompute": True}
BUDGET = {"use_dynamic_batching_in_train": True, "max_tokens_per_microbatch_in_train": 30}
"""Of two ranks one then needs a micro-batch more than the other, which runs one that does not count."""


def fsdp2(checkpoint: Path, **fields: Any) -> Case:
    return Case(str(checkpoint), engine="fsdp2", **fields)


# Loss and gradients


@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"packed": True, "layout": RECOMPUTE},
        {"role": {**BUDGET, "sequence_length_round": 3}, "layout": {"attn_implementation": "eager", **RECOMPUTE}},
        {"role": {**BUDGET, "sequence_length_round": 3}, "packed": True, "layout": {"reshard_after_forward": False}},
        {"micro_batch_size": 4, "packed": True, "layout": {"attn_implementation": "eager"}},
    ],
    ids=["padded", "packed", "padded-budget", "packed-budget", "packed-eager"],
)
def test_loss_and_gradients_are_those_of_transformers_one_sample_at_a_time(
    fields: dict[str, Any], size: int, gang: Gangs, tiny_moe: Path
) -> None:
    batch, case = make_batch(), fsdp2(tiny_moe, **fields)

    outcomes = gang(size).run(run_case, case, batch)

    reference = Reference(str(tiny_moe))
    difference = largest_difference(
        gradients(read_weights(tiny_moe), outcomes[0].weights), reference.gradients(batch, case.config(size))
    )
    print(f"gradients off by {difference:.1e}")
    assert difference < 1e-6
    loss = reference.loss(batch, case.config(size), replay=True).item()
    assert outcomes[0].metrics["actor/total_loss"] == pytest.approx(loss, abs=1e-6)
    assert all(outcome.at_rest for outcome in outcomes)
    counts = outcomes[0].train_counts
    assert counts.trainable == counts.trainable_replayed == batch.loss_mask_N.sum() * LAYERS
    assert counts.missing == 0


@pytest.mark.parametrize("name", TINY_MODELS)
def test_every_architecture(name: str, gang: Gangs, models: dict[str, Path]) -> None:
    batch = make_batch(checkpoint=models[name])
    case = fsdp2(models[name], packed=True, layout=RECOMPUTE)

    outcomes = gang(2).run(run_case, case, batch)

    wanted = Reference(str(models[name])).gradients(batch, case.config(2))
    difference = largest_difference(gradients(read_weights(models[name]), outcomes[0].weights), wanted)
    print(f"{name}: gradients off by {difference:.1e}")
    assert difference < 1e-6
    trained = batch.loss_mask_N.sum() * len(read_facts(models[name]).moe_layers)
    assert outcomes[0].train_counts.trainable_replayed == trained


def test_an_output_that_is_tied_to_the_embedding(gang: Gangs, tmp_path: Path) -> None:
    checkpoint = make_tiny_checkpoint(tmp_path, seed=1, tie_word_embeddings=True)
    batch, case = make_batch(), fsdp2(checkpoint, layout=RECOMPUTE)

    outcome = gang(2).run(run_case, case, batch)[0]

    wanted = Reference(str(checkpoint)).gradients(batch, case.config(2))
    assert "lm_head.weight" not in outcome.weights
    assert largest_difference(gradients(read_weights(checkpoint), outcome.weights), wanted) < 1e-6


@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize("name", ["qwen3_moe", "deepseek_v3"])
def test_megatron_gives_the_same_loss_and_gradients(name: str, size: int, gang: Gangs, models: dict[str, Path]) -> None:
    batch = make_batch(checkpoint=models[name])
    case = fsdp2(models[name], packed=True)
    before = read_weights(models[name])

    ours, theirs = (gang(size).run(run_case, c, batch)[0] for c in (case, replace(case, engine="megatron")))

    difference = largest_difference(gradients(before, ours.weights), gradients(before, theirs.weights))
    print(f"{name}: gradients off by {difference:.1e}")
    assert difference < 1e-5
    assert ours.metrics.keys() == theirs.metrics.keys()
    assert ours.metrics == pytest.approx(theirs.metrics, rel=1e-5, abs=1e-6)
    assert ours.train_counts == theirs.train_counts


def test_clipped_and_decayed_steps_are_megatrons(gang: Gangs, tiny_moe: Path) -> None:
    """Two optimizer steps under warm-up: schedule, clipping, weight decay and its exceptions."""
    training = {"learning_rate": 1e-2, "weight_decay": 0.1, "max_grad_norm": 0.1, "warmup_steps": 1}
    training |= {"adam_epsilon": 1e-3, "lr_scheduler_type": "cosine"}
    case = fsdp2(tiny_moe, mini_batches=2, training=training, options={"ppo_epochs": 2})
    batch = make_batch()

    ours, theirs = (gang(2).run(run_case, c, batch)[0] for c in (case, replace(case, engine="megatron")))

    assert ours.metrics["actor_train/optimizer_steps"] == 4
    assert ours.metrics["actor/lr"] == theirs.metrics["actor/lr"] > 0
    assert largest_difference(ours.weights, theirs.weights) < 1e-5
    assert largest_difference(ours.weights, read_weights(tiny_moe)) > 1e-2


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
    """Gradients with recomputation are those without, to the last bit; rows of the live router among them."""
    name = "deepseek_v3" if packed else "qwen3_moe"
    batch = make_batch(unknown=0.3, checkpoint=models[name])
    case = fsdp2(models[name], mode=mode, packed=packed, dtype="bf16" if packed else "fp32")

    stored, again = (gang(2).run(_raw_gradients, c, batch) for c in (case, replace(case, layout=RECOMPUTE)))

    for one, other in zip(stored, again, strict=True):
        assert one.keys() == other.keys() and one
        assert [parameter for parameter in one if not np.array_equal(one[parameter], other[parameter])] == []


def _raw_gradients(process: ProcessInfo, case: Case, batch: Batch) -> dict[str, np.ndarray]:
    """This rank's part of what the optimizer would step on."""
    strategy = open_strategy(process, case)
    part = shard(batch, process.rank, process.world_size)
    if case.mode == "R2":
        strategy.compute_log_probs(part)
    found = {}
    step = strategy.optimizer.step

    def keep_then_step() -> Any:
        for name, parameter in strategy.model.module.named_parameters():
            assert parameter.grad.dtype is torch.float32
            found[name] = parameter.grad.to_local().numpy().copy()
        return step()

    strategy.optimizer.step = keep_then_step
    strategy.train_step(part, step=1)
    strategy.close()
    return found


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
    """Where both passes are cut alike: the pass without gradients computes every bit as the one with them does."""
    batch = replace(make_batch(checkpoint=models[name]), routes=None)
    case = fsdp2(models[name], mode="R2", packed=packed, dtype=dtype, layout=RECOMPUTE)
    case = replace(case, infer_batch_size=case.micro_batch_size, role={"sequence_length_round": 3})
    assert gang(2).run(_first_ratios, case, batch) == [(1, 1)] * 2


def _first_ratios(process: ProcessInfo, case: Case, batch: Batch) -> tuple[float, float]:
    """(Smallest, largest) ratio of a first step whose two passes are cut alike."""
    strategy = open_strategy(process, case)
    part = shard(batch, process.rank, process.world_size)
    part = replace(part, old_log_probs_N=strategy.compute_log_probs(part).log_probs_N)
    # weights that replay must not ask: what they would choose is another thing
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
        for router in strategy.model.routers:  # routes of their own would now be others
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
    """Steps 1 and 3, two mini-batches each, and rows that the engine never saw left out."""
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
    layers = strategy.model.module.model.layers
    return sum(len(layers[router.layer].mlp.experts._forward_pre_hooks) for router in strategy.model.routers)


def test_the_audit_names_what_went_wrong(gang: Gangs, tiny_moe: Path) -> None:
    role = {"router_replay": {"mode": "R3", "audit": True}}
    first, second = gang(2).run(_audited_mistakes, fsdp2(tiny_moe, layout=RECOMPUTE, role=role), make_batch())
    assert first == second, "every rank raises, and says the same"


def _audited_mistakes(process: ProcessInfo, case: Case, batch: Batch) -> list[str]:
    from roll_r3.strategies.train.fsdp2.audit import ExpertsAudit
    from roll_r3.strategies.train.replay import ReplaySession
    from roll_r3.strategies.train.routed_layer import LayerReplay

    strategy = open_strategy(process, case)
    part = shard(batch, process.rank, process.world_size)
    before = dict(exported(strategy))
    joined, recompute, enter = ReplaySession._joined_rows, LayerReplay._recompute, ExpertsAudit.__enter__
    found = []

    def shifted(*args: Any) -> Any:
        return np.roll(joined(*args), 1, axis=0)

    def shifted_in_backward(layer: Any) -> torch.Tensor:
        return recompute(layer).roll(1, 0)

    def overlook_layer_2(audit: Any) -> Any:
        audit._experts.pop(2)
        return enter(audit)

    for owner, name, wrong, said in (
        (ReplaySession, "_joined_rows", shifted, r"position \d+ \(forward\): recorded experts"),
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


# Log-probabilities


@pytest.mark.parametrize("size", [1, 2])
def test_log_probs_of_samples_that_are_packed_or_padded(size: int, gang: Gangs, tiny_moe: Path) -> None:
    """Samples of one token among them: each is computed as if it were alone, and ranks may have other numbers."""
    batch = _with_lengths(make_batch(), [1, 7, 1, 1, 12, 2, 5, 3])
    reference = Reference(str(tiny_moe))
    with torch.no_grad():
        wanted = [values.numpy() for values in reference.tokens(batch, replay=True)]
    live = reference.live_routes(batch, replay=True)
    pairs = list(zip(live, batch.routes, strict=True))
    agreed = sum(int((np.sort(a.ids_MRK) == np.sort(b.ids_MRK)).all(-1).sum()) for a, b in pairs)
    for packed in (False, True):
        for attention in ("sdpa", "eager"):
            for role in ({}, {"max_tokens_per_microbatch_in_infer": 20, "use_dynamic_batching_in_infer": True}):
                case = fsdp2(tiny_moe, packed=packed, layout={"attn_implementation": attention}, role=role)
                case = replace(case, infer_batch_size=None if role else 3)
                for samples, found, entropies, counts in gang(size).run(_log_probs, case, batch):
                    inputs = batch.inputs_of(samples)
                    assert np.abs(found - wanted[0][inputs]).max() < 1e-5
                    assert np.abs(entropies - wanted[1][inputs]).max() < 1e-5
                    assert (counts.compared, counts.agreed) == (len(batch.input_ids_N) * LAYERS, agreed)


def _with_lengths(batch: Batch, lengths: list[int]) -> Batch:
    """The first tokens of each sample, no more than it has."""
    short = np.minimum(batch.lengths_n, lengths)
    keep = np.concatenate([start + np.arange(n) for start, n in zip(batch.offsets, short, strict=False)])
    arrays = {name: values[keep] for name, values in vars(batch).items() if name.endswith("_N")}
    routes = tuple(RoutedExperts(r.ids_MRK[:, :n]) for r, n in zip(batch.routes, short, strict=True))
    return replace(batch, lengths_n=short, routes=routes, **arrays)


def _log_probs(process: ProcessInfo, case: Case, batch: Batch) -> tuple[Any, ...]:
    strategy = open_strategy(process, case)
    first = SAMPLES if process.world_size == 1 else 2  # uneven: one rank runs micro-batches that do not count
    samples = np.arange(first) if process.rank == 0 else np.arange(first, SAMPLES)
    result = strategy.compute_log_probs(batch.select(samples))
    assert at_rest(strategy) and strategy.returns_results
    strategy.close()
    return samples, result.log_probs_N, result.entropy_N, result.replay


def test_the_reference_routes_by_itself(gang: Gangs, tiny_moe: Path) -> None:
    batch = make_batch()
    case = fsdp2(tiny_moe, options={"use_kl_loss": True})
    with torch.no_grad():
        wanted = Reference(str(tiny_moe)).tokens(batch, replay=False)[0].numpy()
    (found,) = gang(1).run(_reference_beside_actor, case, batch)
    assert np.abs(found - wanted).max() < 1e-5


def _reference_beside_actor(process: ProcessInfo, case: Case, batch: Batch) -> np.ndarray:
    actor, reference = open_strategy(process, case), open_strategy(process, case, "reference")
    assert reference.model.routers[0].module is not actor.model.routers[0].module
    actor.train_step(batch, step=1)
    result = reference.compute_log_probs(batch)
    assert result.replay is None
    actor.close()
    reference.close()
    return result.log_probs_N


# Weights


@pytest.mark.parametrize("name", TINY_MODELS)
def test_exported_weights_are_the_checkpoints(name: str, gang: Gangs, models: dict[str, Path], tmp_path: Path) -> None:
    """Same names and bits as on disk, and transformers reads what is saved back to what it read before."""
    from transformers import AutoModelForCausalLM

    for dtype in ("fp32", "bf16"):
        saved = tmp_path / dtype
        case = fsdp2(models[name], dtype=dtype, mode="disable", layout={"reshard_after_forward": False})
        answers = gang(2).run(_export_and_save, case, make_batch(), saved)
        assert answers[0] == answers[1]
        before, after = (read_weights(path) for path in (models[name], saved))
        if dtype == "bf16":
            bias = "e_score_correction_bias"
            before = {n: w if bias in n else torch.from_numpy(w).bfloat16().float().numpy() for n, w in before.items()}
        assert set(answers[0]) == set(before)
        assert {d for n, d in answers[0].items() if "bias" not in n} == {
            torch.float32 if dtype == "fp32" else torch.bfloat16
        }
        assert largest_difference(before, after) == 0
    whole = [
        AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32) for path in (models[name], tmp_path / "fp32")
    ]
    first, second = (dict(model.state_dict()) for model in whole)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key], second[key]) for key in first)
    assert (tmp_path / "fp32" / "tokenizer.json").is_file()


def _export_and_save(process: ProcessInfo, case: Case, batch: Batch, path: Path) -> dict[str, torch.dtype]:
    strategy = open_strategy(process, case)
    strategy.compute_log_probs(shard(batch, process.rank, process.world_size))  # gathers weights, and lets them go
    found = {name: tensor.dtype for name, tensor in strategy.export_weights()}
    strategy.save_hf(path)
    strategy.close()
    return found


def test_bf16_steps_on_fp32_masters(gang: Gangs, tiny_moe: Path) -> None:
    """A step too small for bf16 moves the masters and, repeated, what is exported."""
    case = fsdp2(tiny_moe, dtype="bf16", layout=RECOMPUTE, training={"learning_rate": 2e-5, "max_grad_norm": 0.0})
    single = fsdp2(tiny_moe, layout=RECOMPUTE)
    batch = make_batch()
    for master, share, loss in gang(2).run(_bf16_steps, case, batch):
        assert master is torch.float32
        assert share[0] < 0.2 < share[1]
        exact = gang(2).run(run_case, single, batch)[0].metrics["actor/total_loss"]
        assert loss == pytest.approx(exact, abs=0.02)


def test_bf16_gradients_are_summed_over_ranks_in_fp32(gang: Gangs, tiny_moe: Path) -> None:
    """Of one micro-batch each: sums of two bf16 numbers, of which bf16 could not hold all."""
    case = fsdp2(tiny_moe, dtype="bf16", micro_batch_size=4)
    for found in gang(2).run(_raw_gradients, case, make_batch()):
        head = torch.from_numpy(found["lm_head.weight"])
        assert (head != head.bfloat16().float()).float().mean() > 0.1


def _bf16_steps(process: ProcessInfo, case: Case, batch: Batch) -> tuple[torch.dtype, list[float], float]:
    """dtype of the masters; share of lm_head's exported entries that have moved after one and after eight steps."""
    strategy = open_strategy(process, case)
    part = shard(batch, process.rank, process.world_size)
    seen = []
    hook = strategy.model.module.lm_head.register_forward_hook(lambda m, x, y: seen.append((x[0].dtype, y.dtype)))
    head = dict(exported(strategy))["lm_head.weight"]
    losses, shares = [], []
    for step in range(1, 9):
        losses.append(strategy.train_step(part, step=step).metrics["actor/total_loss"])
        shares.append(float((dict(exported(strategy))["lm_head.weight"] != head).mean()))
    assert set(seen) == {(torch.bfloat16, torch.bfloat16)}
    hook.remove()
    dtype = next(strategy.model.module.parameters()).dtype
    strategy.close()
    return dtype, [shares[0], shares[-1]], losses[0]


# What is refused, and what is left


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
    losses = [gang(1).run(run_case, fsdp2(tiny_moe), b)[0].metrics["actor/total_loss"] for b in (right, wrong)]
    assert abs(losses[0] - losses[1]) > 1e-2


def test_nothing_is_left_after_a_failure(gang: Gangs, tiny_moe: Path) -> None:
    batch, case = make_batch(), fsdp2(tiny_moe, layout=RECOMPUTE)
    (after,) = gang(1).run(_failures, case, batch)
    assert largest_difference(after, gang(1).run(run_case, case, batch)[0].weights) == 0


def _failures(process: ProcessInfo, case: Case, batch: Batch) -> dict[str, np.ndarray]:
    """Weights after a step that follows every failure."""
    from roll_r3.strategies.train.fsdp2 import strategy as module
    from roll_r3.strategies.train.replay import ReplaySession

    strategy = open_strategy(process, case)
    routers, objective, stage = strategy.model.routers, module.policy_objective, ReplaySession.stage
    calls: list[Any] = []

    def fails(said: str, error: type[Exception] = ReplayError) -> None:
        with pytest.raises(error, match=said):
            strategy.train_step(batch, step=1)
        assert at_rest(strategy)

    def third_fails(*args: Any) -> Any:
        def computed(*pair: Any) -> Any:
            calls.append(pair)
            if len(calls) == 3:
                raise ZeroDivisionError("in the third micro-batch")
            return objective(*args)(*pair)

        return computed

    def skip_layer_2(session: Any, chunk: int, micro: Any) -> None:
        stage(session, chunk, micro)
        routers[2].detach()

    def two_rows_short(session: Any, chunk: int, micro: Any) -> None:
        stage(session, chunk, micro)
        for layer in session.layers[chunk]:
            layer.rows = replace(layer.rows, ids_tK=layer.rows.ids_tK[:-2])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "policy_objective", third_fails)
        fails("in the third micro-batch", ZeroDivisionError)
    for wrong, said in ((skip_layer_2, "layer 2 did not consume its rows"), (two_rows_short, "rows it was given are")):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(ReplaySession, "stage", wrong)
            fails(said)
    with pytest.MonkeyPatch.context() as patch:  # rows are queued, but backward does not recompute
        for layer in strategy.model.module.model.layers:
            patch.setattr(layer, "gradient_checkpointing", False)
        fails("backward did not recompute the router of layer 0")
    strategy.train_step(batch, step=1)
    assert at_rest(strategy)
    weights = dict(exported(strategy))
    with pytest.MonkeyPatch.context() as patch:  # backward recomputes, though nothing was queued
        for router in routers:
            patch.setattr(router, "recomputed", False)
        fails("the router of layer 3 ran outside a micro-batch")
    fails("a backward of this model failed", RollError)  # FSDP2 cannot go on from there, and would not say so
    strategy.close()
    return weights


def test_a_gradient_that_is_not_finite_stops_the_run(gang: Gangs, tiny_moe: Path) -> None:
    batch = make_batch()
    gang(2).run(_not_finite, fsdp2(tiny_moe), replace(batch, advantages_N=np.full_like(batch.advantages_N, np.inf)))


def _not_finite(process: ProcessInfo, case: Case, batch: Batch) -> None:
    strategy = open_strategy(process, case)
    before = dict(exported(strategy))
    with pytest.raises(RollError, match=r"the gradient norm is (nan|inf): the optimizer did not step"):
        strategy.train_step(shard(batch, process.rank, process.world_size), step=1)
    assert largest_difference(before, dict(exported(strategy))) == 0
    strategy.close()


def test_a_router_that_is_not_known_is_refused_by_its_class(gang: Gangs, tiny_moe: Path) -> None:
    with pytest.raises(RankFailed, match="layer 0 of Qwen3MoeForCausalLM routes by Qwen3MoeTopKRouter"):
        gang(1).run(_unknown_router, fsdp2(tiny_moe))


def _unknown_router(process: ProcessInfo, case: Case) -> None:
    from roll_r3.models.hf import routers

    with pytest.MonkeyPatch.context() as patch:
        patch.delitem(routers.GATES, "Qwen3MoeTopKRouter")
        open_strategy(process, case)


@pytest.mark.parametrize("role", ["actor_train", "reference"])
def test_a_checkpoints_own_code_is_never_the_model(role: str, gang: Gangs, tmp_path: Path) -> None:
    checkpoint = make_tiny_checkpoint(tmp_path / "tiny")
    ran = with_code_of_its_own(checkpoint)
    trusts = {"model_args": {"trust_remote_code": True, "dtype": "fp32"}} if role == "actor_train" else {}
    gang(1).run(_open_and_close, fsdp2(checkpoint, role=trusts, options={"use_kl_loss": True}), role)
    assert not ran.exists()


def _open_and_close(process: ProcessInfo, case: Case, role: str) -> None:
    open_strategy(process, case, role).close()


def test_a_world_that_is_left_takes_its_threads_with_it(tiny_moe: Path) -> None:
    gang = Gang(2)
    try:
        assert gang.run(_threads_left, fsdp2(tiny_moe), make_batch()) == [[0, 0]] * 2
    finally:
        gang.close()


def _threads_left(process: ProcessInfo, case: Case, batch: Batch) -> list[int]:
    left = []
    for port in (1, 2):
        strategy = open_strategy(replace(process, master_port=process.master_port + port), case)
        strategy.train_step(shard(batch, process.rank, process.world_size), step=1)
        strategy.close()
        del strategy
        gc.collect()
        names = [(task / "comm").read_text() for task in Path("/proc/self/task").iterdir()]
        left.append(sum("gloo" in name for name in names))
    return left


# Checkpoints to go on from

MOMENTUM = {"learning_rate": 1e-2, "warmup_steps": 1, "lr_scheduler_type": "cosine", "weight_decay": 0.1}
MOMENTUM |= {"adam_epsilon": 1e-3}
"""A step that depends on Adam's moments and on the number of steps before it, and multiplies no rounding."""


@pytest.mark.parametrize("name", ["qwen3_moe", "deepseek_v3"])
def test_training_goes_on_from_a_checkpoint(name: str, gang: Gangs, models: dict[str, Path], tmp_path: Path) -> None:
    """To the bit on as many ranks, and on another number of them up to the order of sums."""
    case = fsdp2(models[name], layout=RECOMPUTE, training=MOMENTUM)
    batch = make_batch(checkpoint=models[name])
    path = tmp_path / "saved" / "step2"

    whole = gang(2).run(_two_steps_saved_and_one_more, case, batch, path)
    again = gang(2).run(_one_more_step, case, batch, path)
    (alone,) = gang(1).run(_one_more_step, replace(case, micro_batch_size=4), batch, path)

    assert [wanted[2] for wanted in whole] == [found[2] for found in again], "parts of each rank, to the bit"
    assert whole[0][0] == again[0][0] == alone[0] > 0, "learning rate"
    assert largest_difference(whole[0][1], again[0][1]) == 0
    difference = largest_difference(whole[0][1], alone[1])
    print(f"{name}: one rank off by {difference:.1e}")
    assert difference < 1e-6
    assert largest_difference(whole[0][1], read_weights(models[name])) > 1e-3
    files = sorted(file.name for file in path.iterdir())
    assert files == [f"shard-0000{rank}-model-00001-of-00001.safetensors" for rank in (1, 2)]
    assert [folder.name for folder in path.parent.iterdir()] == ["step2"]


def _step_of(strategy: Any, process: ProcessInfo, batch: Batch, step: int) -> tuple[float, Any, Any]:
    """Learning rate, exported weights, and digests of this rank's parts after a step."""
    metrics = strategy.train_step(shard(batch, process.rank, process.world_size), step=step).metrics
    digests = {
        name: sha256((tensor.to_local() if isinstance(tensor, DTensor) else tensor).numpy().tobytes()).hexdigest()
        for name, tensor in strategy._state().items()
    }
    return metrics["actor/lr"], dict(exported(strategy)), digests


def _two_steps_saved_and_one_more(process: ProcessInfo, case: Case, batch: Batch, path: Path) -> tuple[Any, ...]:
    strategy = open_strategy(process, case)
    for name, buffer in strategy.model.module.named_buffers():
        if name.endswith("e_score_correction_bias"):
            buffer.add_(1.0)  # not what the model's own checkpoint holds
    for step in (1, 2):
        _step_of(strategy, process, batch, step)
    strategy.save_checkpoint(path)
    with pytest.raises(RollError, match="step2 is there already: a checkpoint never overwrites one"):
        strategy.save_checkpoint(path)
    found = _step_of(strategy, process, batch, 3)
    strategy.close()
    return found


def _one_more_step(process: ProcessInfo, case: Case, batch: Batch, path: Path) -> tuple[Any, ...]:
    strategy = open_strategy(process, case)
    strategy.load_checkpoint(path)
    found = _step_of(strategy, process, batch, 3)
    strategy.close()
    return found


def test_a_checkpoint_that_cannot_be_loaded_says_so(gang: Gangs, models: dict[str, Path], tmp_path: Path) -> None:
    saved = tmp_path / "qwen3"
    gang(2).run(_save, fsdp2(models["qwen3_moe"]), saved)
    said = gang(2).run(_refused_checkpoint, fsdp2(models["mixtral"]), saved)
    assert all("is no checkpoint of this model: rank 0: it holds model." in text for text in said)
    for number in (1, 2):
        part = saved / f"shard-0000{number}-model-00001-of-00001.safetensors"
        part.rename(tmp_path / part.name)
        said = gang(2).run(_refused_checkpoint, fsdp2(models["qwen3_moe"]), saved)
        assert all("it is not whole: a file" in text or "has shape" in text for text in said)
        part.write_bytes((tmp_path / part.name).read_bytes()[:-1000])
        said = gang(2).run(_refused_checkpoint, fsdp2(models["qwen3_moe"]), saved)
        assert all("this model: rank 0: SafetensorError" in text for text in said)
        (tmp_path / part.name).rename(part)
    said = gang(2).run(_refused_checkpoint, fsdp2(models["qwen3_moe"]), tmp_path / "nowhere")
    assert all("nowhere is no checkpoint of this model: rank 0: there is no such directory" in text for text in said)


@pytest.mark.parametrize("change", ["one more", "one less", "another shape", "unreadable on one rank"])
def test_a_checkpoint_of_another_model_is_not_written_into_this_one(
    change: str, gang: Gangs, tiny_moe: Path, tmp_path: Path
) -> None:
    """In one tensor, and every rank learns of it, also of what one rank alone has met."""
    first, second = gang(2).run(_changed_checkpoint, fsdp2(tiny_moe), tmp_path / "saved", change)
    assert first == second
    said = {
        "one more": r"rank 0: it holds model\.other, which this model has not",
        "one less": r"rank 0: it has no model\.model\.norm\.weight",
        "another shape": r"rank 0: model\.model\.norm\.weight has shape \[5\], in this model \[64\]",
        "unreadable on one rank": r"this model: rank 1: OSError: stale file handle$",
    }
    assert re.search(said[change], first), first


def _changed_checkpoint(process: ProcessInfo, case: Case, path: Path, change: str) -> str:
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader

    from roll_r3.strategies.train.fsdp2 import checkpoint

    strategy = open_strategy(process, case)
    saved, name = strategy._state(), "model.model.norm.weight"
    if change == "one more":
        saved["model.other"] = torch.ones(3)
    elif change == "one less":
        del saved[name]
    elif change == "another shape":
        saved[name] = torch.ones(5)
    checkpoint.save(saved, path)
    with torch.no_grad():
        for tensor in strategy._state().values():
            tensor.fill_(7)
    with pytest.MonkeyPatch.context() as patch:
        if change == "unreadable on one rank" and process.rank == 1:

            def unreadable(reader: Any) -> None:
                raise OSError("stale file handle")

            patch.setattr(HuggingFaceStorageReader, "read_metadata", unreadable)
        with pytest.raises(ConfigError) as refused:
            strategy.load_checkpoint(path)
    kept = {n: t for n, t in strategy._state().items() if n != "optimizer.done"}  # of which each call makes another
    assert all(((t.to_local() if isinstance(t, DTensor) else t) == 7).all() for t in kept.values())
    strategy.close()
    return str(refused.value)


def test_a_checkpoint_that_cannot_be_written_says_so_on_every_rank(gang: Gangs, tiny_moe: Path, tmp_path: Path) -> None:
    """Making the directory and giving it its name are rank 0's alone."""
    (tmp_path / "file").touch()
    for said in gang(2).run(_unwritten, fsdp2(tiny_moe), tmp_path):
        assert re.search(r"checkpoint .*/file/saved was not written: rank 0: NotADirectoryError: ", said[0]), said[0]
        assert re.search(r"checkpoint .*/saved was not written: rank 0: OSError: no space$", said[1]), said[1]
    assert not (tmp_path / "saved").exists()


def _unwritten(process: ProcessInfo, case: Case, path: Path) -> list[str]:
    from roll_r3.strategies.train.fsdp2 import checkpoint

    strategy = open_strategy(process, case)
    found = []
    with pytest.MonkeyPatch.context() as patch:
        with pytest.raises(RollError) as refused:
            strategy.save_checkpoint(path / "file" / "saved")
        found.append(str(refused.value))

        def no_space(*names: Path) -> None:
            raise OSError("no space")

        patch.setattr(checkpoint.os, "rename", no_space)
        with pytest.raises(RollError) as refused:
            strategy.save_checkpoint(path / "saved")
        found.append(str(refused.value))
    strategy.close()
    return found


@pytest.mark.parametrize("lost", ["model.layers.2.mlp.experts.3.up_proj.weight", "model.norm.weight", "index"])
def test_weights_that_a_checkpoint_lacks_stop_every_rank(lost: str, gang: Gangs, tmp_path: Path) -> None:
    checkpoint = make_tiny_checkpoint(tmp_path / "tiny")
    if lost == "index":
        (checkpoint / "model.safetensors.index.json").write_text("no JSON")
        wanted = "the model was not built: rank 0: JSONDecodeError"
    else:
        weights = load_file(checkpoint / "model.safetensors")
        del weights[lost]
        save_file(weights, checkpoint / "model.safetensors", metadata={"format": "pt"})
        wanted = f"the model was not built: rank 0: {checkpoint} has no tensor {lost}, which"
    for said in gang(2).run(_not_built, fsdp2(checkpoint)):
        assert said.startswith(wanted), said


def _not_built(process: ProcessInfo, case: Case) -> str:
    with pytest.raises(ConfigError) as refused:
        open_strategy(process, case)
    world.leave()
    return str(refused.value)


def _save(process: ProcessInfo, case: Case, path: Path) -> None:
    strategy = open_strategy(process, case)
    strategy.save_checkpoint(path)
    strategy.close()


def _refused_checkpoint(process: ProcessInfo, case: Case, path: Path) -> str:
    strategy = open_strategy(process, case)
    with pytest.raises(ConfigError) as refused:
        strategy.load_checkpoint(path)
    strategy.close()
    return str(refused.value)
