"""Truncated sampling on real engines: sets and log-probabilities against transformers, and on both trainers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from distributed import Gang
from megatron_cases import Case, open_strategy
from rollout_cases import Reference, trajectories

from roll_r3.batch.batch import Batch
from roll_r3.strategies.base import GenerateResult, ProcessInfo

BY_TOP_K = {"temperature": 0.7, "top_k": 20, "top_p": 0.9, "return_kept": True}
"""Settings of a recipe. The weights are random, so top_k cuts first."""
BY_TOP_P = {**BY_TOP_K, "top_p": 0.1}
"""Settings under which top_p cuts first, at sets of several sizes."""
SAME = 5e-6
"""Largest difference in fp32, in nats, between log-probabilities over one set."""


def assert_sets_are_what_was_sampled_from(
    results: Sequence[GenerateResult], checkpoint: Path, sampling: Mapping[str, Any], *, one_by_one: bool = False
) -> None:
    """Compare every set with top_k and top_p of a plain forward, and every log-probability with one over the set.

    Args:
        one_by_one: top_p is a share of what top_k keeps; False: of the whole distribution.
    """
    reference, sizes, worst = Reference(checkpoint, sampling["temperature"]), [], 0.0
    for t in trajectories(results).values():
        assert t.kept is not None
        logits_RV = reference.logits(t)
        ordered_RV, order_RV = logits_RV.softmax(-1).sort(-1, descending=True)
        ends = np.cumsum(t.kept.counts_S)
        for row, (end, count) in enumerate(zip(ends, t.kept.counts_S, strict=True)):
            ids = t.kept.ids_J[end - count : end].tolist()
            before_V = ordered_RV[row].cumsum(-1) - ordered_RV[row]
            if one_by_one:
                before_V = before_V / ordered_RV[row][: sampling["top_k"]].sum()
            kept_V = (before_V < sampling["top_p"]) & (torch.arange(len(before_V)) < sampling["top_k"])
            wanted = order_RV[row][kept_V]
            assert sorted(ids) == sorted(wanted.tolist())
            over_set = logits_RV[row, ids].log_softmax(-1)
            worst = max(worst, abs(float(over_set[ids.index(t.response_ids[row])]) - float(t.log_probs[row])))
            sizes.append(count)
    print(f"log-probabilities over sets of {min(sizes)} to {max(sizes)} tokens: off by {worst:.1e}")
    assert worst < SAME
    cut_by_top_p = sampling == BY_TOP_P or one_by_one
    assert min(sizes) < max(sizes) < sampling["top_k"] if cut_by_top_p else max(sizes) == sampling["top_k"]


def assert_trainers_agree(
    results: Sequence[GenerateResult], checkpoint: Path, gang: Callable[[int], Gang], mode: str = "R3"
) -> None:
    """Compare the engine's log-probabilities with both trainers', and see sets of other tokens as a difference."""
    batch = Batch.from_trajectories([t for result in results for t in result.trajectories])
    assert batch.kept is not None
    mask_N = batch.loss_mask_N
    for engine in ("fsdp2", "megatron"):
        case = Case(str(checkpoint), mode=mode, engine=engine)
        (log_probs_N, whole_N, agreed) = gang(1).run(_with_and_without_sets, case, batch)[0]
        worst = np.abs(log_probs_N - batch.rollout_log_probs_N)[mask_N].max()
        bias = np.abs(whole_N - batch.rollout_log_probs_N)[mask_N].max()
        print(f"{engine}: trainer - engine {worst:.1e}, over the whole vocabulary {bias:.1e}")
        assert worst < SAME
        assert bias > 0.05, "the sets matter"
        assert agreed == 1, "the engine's routes are those of the trainer, and are replayed"


def _with_and_without_sets(process: ProcessInfo, case: Case, batch: Batch) -> tuple[Any, Any, float]:
    strategy = open_strategy(process, case)
    result = strategy.compute_log_probs(batch)
    whole = strategy.compute_log_probs(replace(batch, kept=None)).log_probs_N
    strategy.close()
    agreed = result.replay.agreed / result.replay.compared if result.replay else 1.0
    return result.log_probs_N, whole, agreed
