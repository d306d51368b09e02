"""Every policy-gradient loss in every small layout of both trainers, against transformers one sample at a time.

A gang runs all losses on one model: gradients are read where the optimizer would use them, and no weight changes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from distributed import Gang
from fsdp2_cases import BUDGET
from megatron_cases import (
    FULL_RECOMPUTE,
    INTERLEAVED,
    Case,
    Reference,
    Weights,
    exported,
    largest_difference,
    make_batch,
    open_strategy,
    shard,
)

from roll_r3.batch.batch import Batch
from roll_r3.config.pipeline import RLVRConfig
from roll_r3.strategies.base import ProcessInfo
from roll_r3.trainers.update import StepFigures

pytestmark = pytest.mark.integration
Gangs = Callable[[int], Gang]

GSPO = {"importance_sampling": "seq", "loss_agg_mode": "seq-mean-token-mean", "pg_clip": 0.03}
VARIANTS: dict[str, dict[str, Any]] = {
    "ppo": {"pg_clip": 0.05},
    "gspo": GSPO,
    "gspo with cispo's loss": {**GSPO, "pg_variant": "cispo"},
    "cispo": {"pg_variant": "cispo", "pg_clip_low": 0.1, "pg_clip_high": 0.05},
    "dppo_tv": {"pg_variant": "dppo_tv", "pg_clip": 0.0002},
    "topr": {"pg_variant": "topr"},
    "kimi15": {"pg_variant": "kimi15"},
}
BUDGETED = {**BUDGET, "max_tokens_per_microbatch_in_train": 40}
CP2 = {"context_parallel_size": 2}
TP2 = {"tensor_model_parallel_size": 2}
PP2 = {"pipeline_model_parallel_size": 2}
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "one rank": (1, {"micro_batch_size": 8}),
    "packed": (1, {"packed": True, "layout": FULL_RECOMPUTE}),
    "CP2": (2, {"layout": {**CP2, **FULL_RECOMPUTE}}),
    "CP2 packed": (2, {"layout": CP2, "packed": True, "micro_batch_size": 4}),
    "TP2 packed": (2, {"layout": TP2, "packed": True}),
    "PP2 packed": (2, {"layout": PP2, "packed": True}),
    "PP2 VPP2 with a repeat": (2, {"layout": {**INTERLEAVED, **FULL_RECOMPUTE}, "role": BUDGETED}),
    "DP2 packed": (2, {"packed": True}),
    "CP2 PP2 VPP2 packed with a repeat": (4, {"layout": {**CP2, **INTERLEAVED}, "packed": True, "role": BUDGETED}),
    "FSDP2": (1, {"engine": "fsdp2"}),
    "FSDP2 of two ranks, packed with a repeat": (2, {"engine": "fsdp2", "packed": True, "role": BUDGET}),
}


@cache
def near_the_policy(checkpoint: str) -> Batch:
    """Return samples whose old policy is near the model's, with scores and policy-gradient weights."""
    batch, rng = make_batch(), np.random.default_rng(1)
    with torch.no_grad():
        live_N = Reference(checkpoint).tokens(batch, replay=True)[0].numpy()
    total = len(live_N)
    return replace(
        batch,
        old_log_probs_N=(live_N + 0.1 * rng.standard_normal(total)).astype(np.float32),
        scores_n=np.array([1, 0, 0, 1, -1, 2, 0, 1], np.float32),
        pg_weights_N=rng.choice([0.0, 0.5, 1.0, 2.0], total).astype(np.float32),
    )


def slow_loss(log_probs: torch.Tensor, batch: Batch, config: RLVRConfig) -> torch.Tensor:
    """Return the loss, sample by sample, with a ratio of the sample differentiated token by token."""
    low, high = config.clip_range
    losses, offsets = [], batch.offsets
    for i in range(batch.num_samples):
        rows = torch.arange(offsets[i], offsets[i + 1])[batch.loss_mask_N[offsets[i] : offsets[i + 1]]]
        if not len(rows):
            continue
        live, old, a, weight = (
            log_probs[rows],
            *(torch.from_numpy(x)[rows] for x in (batch.old_log_probs_N, batch.advantages_N, batch.pg_weights_N)),
        )
        ratio = (live - old).exp()
        if config.importance_sampling == "seq":
            ratio = (live - old).mean().exp().detach() * live.exp() / live.exp().detach()
        kept = ratio.clamp(1 - low, 1 + high).detach()
        if config.pg_variant == "ppo":
            loss = -torch.minimum(ratio * a, ratio.clamp(1 - low, 1 + high) * a)
        elif config.pg_variant == "cispo":
            loss = -kept * a * live
        elif config.pg_variant == "topr":
            loss = -(1.0 if batch.scores_n[i] > 0 else ratio.detach().clamp(max=1)) * a * live
        elif config.pg_variant == "kimi15":
            loss = -a * live + config.pg_args.kimi15_tau * (live - old).square() / 2
        else:
            moved = (live.exp() - old.exp()).detach()
            outside = (a.sign() * moved) > torch.where(a > 0, high, low)
            loss = -ratio.detach() * a * live * ~outside
        losses.append(loss * weight)
    if config.loss_agg_mode == "token-mean":
        return torch.cat(losses).mean()
    return torch.stack([loss.mean() for loss in losses]).mean()


@cache
def wanted_gradients(checkpoint: str) -> dict[str, tuple[float, Weights]]:
    """Return the loss and its gradients for every variant, from one forward pass."""
    batch, reference = near_the_policy(checkpoint), Reference(checkpoint)
    log_probs, _ = reference.tokens(batch, replay=True)
    found = {}
    for name, options in VARIANTS.items():
        reference.model.zero_grad()
        loss = slow_loss(log_probs, batch, Case(checkpoint, options=options).config())
        loss.backward(retain_graph=True)
        found[name] = loss.item(), reference._file_names({n: p.grad for n, p in reference.model.named_parameters()})
    return found


def run_variants(
    process: ProcessInfo, case: Case, batch: Batch, variants: Sequence[str]
) -> dict[str, tuple[dict[str, float], Weights | None]]:
    """Return the metrics and the gradients of each variant, the gradients on the first rank only."""
    strategy = open_strategy(process, case)
    backend, part = strategy.backend, shard(batch, strategy.data_parallel_rank, strategy.data_parallel_size)
    gradients: Weights = {}

    def keep(norm: float) -> StepFigures:
        gradients.clear()
        gradients.update(_exported_gradients(strategy))
        return StepFigures(norm, 0.0)

    backend.optimizer.step = keep
    found = {}
    for name in variants:
        strategy.role = replace(case, options=VARIANTS[name]).view(strategy.data_parallel_size)
        metrics = strategy.train_step(part, step=1).metrics
        found[name] = metrics, dict(gradients) if process.rank == 0 else None
    strategy.close()
    return found


@torch.no_grad()
def _exported_gradients(strategy: Any) -> list[tuple[str, np.ndarray]]:
    """Export the gradients in the place of the weights; collective."""
    model = strategy.backend.model
    modules = model.chunks if hasattr(model, "chunks") else [model.module]
    kept = []
    for parameter in (p for module in modules for p in module.parameters()):
        gradient = parameter.main_grad if hasattr(parameter, "main_grad") else parameter.grad
        place, gradient = (x.to_local() if hasattr(x, "to_local") else x for x in (parameter, gradient))
        kept.append((place, place.clone()))
        place.copy_(gradient)
    out = exported(strategy)
    for place, weight in kept:
        place.copy_(weight)
    return out


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_loss_equals_the_reference(name: str, gang: Gangs, tiny_moe: Path) -> None:
    size, fields = LAYOUTS[name]
    case = Case(str(tiny_moe), **fields)

    variants = ["gspo"] if size == 4 else list(VARIANTS)  # four ranks on two cores are slow

    outcomes = gang(size).run(run_variants, case, near_the_policy(str(tiny_moe)), variants)

    wanted = wanted_gradients(str(tiny_moe))
    for variant in variants:
        (metrics, found), (loss, gradients) = outcomes[0][variant], wanted[variant]
        difference = largest_difference(found, gradients)
        print(f"{name}, {variant}: largest |gradient - reference| {difference:.1e}")
        assert difference < 1e-6, variant
        assert metrics["actor/loss"] == pytest.approx(loss, abs=2e-6), variant
        assert variant == "kimi15" or 0.05 < metrics["actor/pg_clipfrac"] < 0.95, variant
        assert all(outcome[variant][0] == metrics for outcome in outcomes), variant
