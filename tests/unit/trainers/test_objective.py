"""Loss figures of a training step against a loop: figures of the minimised loss, in every mode."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from roll_r3.algorithms.stats import TokenStats
from roll_r3.batch.batch import Batch
from roll_r3.batch.data_parallel import DataParallel
from roll_r3.batch.token_map import Layout
from roll_r3.config.derived import algorithm_of
from roll_r3.config.pipeline import RLVRConfig
from roll_r3.tracking.names import declared_order
from roll_r3.trainers.cutting import cut
from roll_r3.trainers.finite import LossSum
from roll_r3.trainers.objective import policy_objective
from roll_r3.trainers.update import denominators

CPU = torch.device("cpu")
VOCAB = 11
MODES: list[dict[str, Any]] = [
    {"loss_agg_mode": "token-mean"},
    {"loss_agg_mode": "seq-mean-token-mean"},
    {"loss_agg_mode": "seq-mean-token-sum"},
    {"loss_agg_mode": "seq-mean-token-sum-norm", "loss_scale_factor": 5},
    {"loss_agg_mode": "seq-mean-token-sum-norm"},
]
RESPONSE_LENGTH = 8


def batch_of(seed: int) -> Batch:
    """Return responses of 1 to 8 tokens, and two fillers without trained tokens."""
    rng = np.random.default_rng(seed)
    responses = np.array([1, 8, 3, 5, 2, 4])
    mask_N = np.concatenate([np.r_[np.zeros(2, bool), np.ones(r, bool)] for r in responses])
    n = len(mask_N)

    def values(scale: float = 1.0) -> np.ndarray:
        return np.where(mask_N, scale * rng.normal(size=n) - 2, 0).astype(np.float32)

    batch = Batch(
        tuple(map(str, range(len(responses)))),
        responses + 2,
        np.arange(n),  # row of the logits
        rng.integers(VOCAB, size=n),
        mask_N,
        values(0.1),
        old_log_probs_N=values(0.1),
        ref_log_probs_N=values(0.3),
        advantages_N=np.where(mask_N, rng.normal(size=n), 0).astype(np.float32),
        pg_weights_N=np.where(mask_N, rng.random(n), 0).astype(np.float32),
    )
    return batch.filled_up(8)


def token_values(logits_BSV: torch.Tensor, labels_BS: torch.Tensor, kept: Any, entropy_gradient: bool) -> Any:
    table = logits_BSV.log_softmax(-1)
    return table.gather(-1, labels_BS[..., None])[..., 0], -(table.exp() * table).sum(-1)


def slow(batch: Batch, logits_NV: torch.Tensor, c: RLVRConfig) -> dict[str, float]:
    """Compute the figures token by token, over every trained token of every sample."""
    table = logits_NV.double().log_softmax(-1)
    terms: dict[str, list[list[float]]] = {"loss": [], "pg": [], "kl": []}
    for i in range(batch.num_samples):
        rows: dict[str, list[float]] = {name: [] for name in terms}
        for p in range(batch.offsets[i], batch.offsets[i + 1]):
            if not batch.loss_mask_N[p]:
                continue
            lp = table[batch.input_ids_N[p]]
            live, a = float(lp[batch.labels_N[p]]), float(batch.advantages_N[p])
            r = math.exp(live - float(batch.old_log_probs_N[p]))
            d = live - float(batch.ref_log_probs_N[p])
            pg, kl = -min(r * a, min(max(r, 0.8), 1.2) * a), min(math.exp(-d) - 1 + d, 10)
            pg *= float(batch.pg_weights_N[p])
            rows["pg"].append(pg)
            rows["kl"].append(kl)
            rows["loss"].append(pg + c.kl_loss_coef * kl + c.entropy_loss_coef * float((lp.exp() * lp).sum()))
        for name, values in rows.items():
            terms[name].append(values)
    return {f"actor/{n}{'_loss' * (n != 'loss')}": aggregated(rows, c) for n, rows in terms.items()}


def aggregated(samples: list[list[float]], c: RLVRConfig) -> float:
    kept = [sample for sample in samples if sample]
    if c.loss_agg_mode == "token-mean":
        return sum(map(sum, kept)) / sum(map(len, kept))
    divisor = {"seq-mean-token-sum": 1, "seq-mean-token-sum-norm": c.loss_scale_factor or RESPONSE_LENGTH}
    return sum(sum(s) / divisor.get(c.loss_agg_mode, len(s)) for s in kept) / len(kept)


@pytest.mark.parametrize("changes", MODES)
@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize(("micro_batch", "packed"), [(8, False), (1, False), (3, True)])
def test_loss_figures_are_those_of_the_loss_that_was_minimised(
    changes: dict[str, Any], ranks: int, micro_batch: int, packed: bool
) -> None:
    c = RLVRConfig(
        exp_name="t",
        pretrain="x",
        actor_train={},
        actor_infer={},
        use_kl_loss=True,
        kl_loss_coef=0.2,
        entropy_loss_coef=0.1,
        response_length=RESPONSE_LENGTH,
        **changes,
    )
    steps = [batch_of(seed) for seed in (0, 1)]
    logits = [torch.randn(b.loss_mask_N.size, VOCAB, generator=torch.Generator().manual_seed(7)) for b in steps]
    stats, minimised = [TokenStats() for _ in range(ranks)], []
    for batch, logits_NV in zip(steps, logits, strict=True):
        shards = [batch.select(np.arange(rank, batch.num_samples, ranks)) for rank in range(ranks)]
        denominator = sum(denominators([s], c.loss_agg_mode, DataParallel(0, 1, CPU))[0] for s in shards)
        sums = [LossSum() for _ in shards]
        for shard, whole, total in zip(shards, stats, sums, strict=True):
            here = TokenStats()
            objective = policy_objective(
                token_values, CPU, algorithm_of(c), denominator, here, total, lambda values: None
            )
            groups = np.array_split(np.arange(shard.num_samples), -(-shard.num_samples // micro_batch))
            for part in cut(shard, groups, Layout(packed=packed)):
                rows_BS = part.tensor(part.batch.input_ids_N, 0, CPU)
                objective(part, logits_NV[rows_BS])
                repeat = replace(part, counted=False)  # fills the schedule
                objective(repeat, logits_NV[rows_BS])
            whole.merge(here)
        minimised.append(sum(float(total._sum) for total in sums))
    figures = reduced(stats)
    wanted = [slow(batch, logits_NV, c) for batch, logits_NV in zip(steps, logits, strict=True)]
    for name in wanted[0]:
        assert figures[name] == pytest.approx(np.mean([w[name] for w in wanted]), rel=1e-5, abs=1e-6), name
    assert figures["actor/loss"] == pytest.approx(np.mean(minimised), rel=1e-6), "what the optimizer saw"
    assert declared_order(figures)[1] == []


def reduced(stats: list[TokenStats]) -> dict[str, float]:
    """Sum over ranks run one after the other: a first pass collects their values, a second one returns the sums."""
    given: list[list[torch.Tensor]] = []
    for one in stats:
        given.append([])
        one.reduce(lambda values, _, mine=given[-1]: mine.append(values.clone()))
    calls = iter(range(len(given[0])))

    def all_reduce(values: torch.Tensor, operation: str) -> None:
        call = next(calls)
        together = torch.stack([mine[call] for mine in given])
        values.copy_(together.sum(0) if operation == "sum" else together.amax(0))

    return stats[0].reduce(all_reduce)
