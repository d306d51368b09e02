"""Log-probabilities and entropies over kept tokens: against a dense mask and a loop, whole, and in parts."""

from __future__ import annotations

import math
import threading
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from roll_r3.algorithms.stats import TokenStats
from roll_r3.batch.batch import Batch
from roll_r3.batch.kept_tokens import KeptTokens
from roll_r3.batch.micro_batch import KeptSlots, MicroBatch
from roll_r3.batch.token_map import Layout
from roll_r3.config.algorithm import AlgorithmConfig
from roll_r3.config.derived import algorithm_of
from roll_r3.config.pipeline import RLVRConfig
from roll_r3.trainers.cutting import cut
from roll_r3.trainers.finite import LossSum
from roll_r3.trainers.fsdp2.token_values import label_log_probs_and_entropy
from roll_r3.trainers.kept_values import VocabularyPart, kept_log_probs_and_entropy
from roll_r3.trainers.objective import Objective, log_prob_objective, policy_objective

CPU = torch.device("cpu")
VOCAB = 13
TEMPERATURE = 0.7


def batch_of(seed: int = 0, *, whole: bool = False) -> Batch:
    """Return samples with a set for every trained label, of 1 to `VOCAB` ids in random order."""
    rng = np.random.default_rng(seed)
    lengths = np.array([5, 2, 7])
    total = int(lengths.sum())
    mask, labels = rng.random(total) < 0.7, rng.integers(VOCAB, size=total)
    sets = []
    for trained, label in zip(mask, labels, strict=True):
        size = VOCAB if whole else rng.integers(1, VOCAB)
        others = rng.permutation(np.delete(np.arange(VOCAB), label))[: size - 1]
        sets.append(rng.permutation([*others, label]).tolist() if trained else [])
    return Batch(
        ("a", "b", "c"),
        lengths,
        np.arange(total),
        labels,
        mask,
        np.where(mask, -1, 0).astype(np.float32),
        advantages_N=np.where(mask, rng.normal(size=total), 0).astype(np.float32),
        kept=KeptTokens.from_lists(sets),
    )


def micro_of(batch: Batch, *, packed: bool = False) -> MicroBatch:
    return cut(batch, [np.arange(batch.num_samples)], Layout(packed=packed, multiple=4))[0]


def dense(logits_BSV: torch.Tensor, micro: MicroBatch) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the values by a mask of tokens x vocabulary, in fp64; 0 without a set."""
    assert micro.batch.kept is not None
    ends = np.cumsum(micro.batch.kept.counts_S)
    log_probs, entropies = [], []
    for row, slots in zip(logits_BSV.double() / TEMPERATURE, micro.tokens.slots_BS, strict=True):
        for z_V, slot in zip(row, slots, strict=True):
            size = micro.batch.kept.counts_S[slot] if slot >= 0 else 0
            if not size:
                log_probs.append(z_V[0] * 0)
                entropies.append(z_V[0] * 0)
                continue
            dropped_V = torch.ones(len(z_V), dtype=torch.bool)
            dropped_V[micro.batch.kept.ids_J[ends[slot] - size : ends[slot]].tolist()] = False
            values_V = z_V.masked_fill(dropped_V, -math.inf).log_softmax(-1)
            log_probs.append(values_V[int(micro.batch.labels_N[slot])])
            entropies.append(-sum(v.exp() * v for v in values_V[~dropped_V]))
    shape = micro.tokens.slots_BS.shape
    return torch.stack(log_probs).view(shape), torch.stack(entropies).view(shape)  # type: ignore[arg-type]


def weighted(values: tuple[torch.Tensor, torch.Tensor], seed: int = 3) -> torch.Tensor:
    """Return a loss with another weight for every value."""
    generator = torch.Generator().manual_seed(seed)
    return sum((torch.randn(v.shape, generator=generator) * v).sum() for v in values)  # type: ignore[return-value]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("packed", [False, True])
def test_values_and_gradients_equal_a_dense_mask(packed: bool, dtype: torch.dtype) -> None:
    micro = micro_of(batch_of(), packed=packed)
    torch.manual_seed(0)
    logits = (5 * torch.randn(*micro.tokens.slots_BS.shape, VOCAB)).to(dtype)
    ours, theirs = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    values = label_log_probs_and_entropy(
        ours,
        micro.tensor(micro.batch.labels_N, 0, CPU),
        micro.kept(CPU),
        temperature=TEMPERATURE,
        entropy_gradient=True,
    )
    wanted = dense(theirs, micro)
    for found, value in zip(values, wanted, strict=True):
        assert found.dtype is torch.float32
        assert torch.allclose(found.double(), value, atol=1e-6)
    weighted(values).backward()
    weighted(wanted).backward()
    assert ours.grad is not None and theirs.grad is not None
    assert torch.allclose(ours.grad, theirs.grad, atol=2e-2 if dtype is torch.bfloat16 else 1e-6)
    assert theirs.grad.abs().max() > 0.5


def test_the_whole_vocabulary_as_a_set_changes_nothing_but_rounding() -> None:
    micro = micro_of(batch_of(whole=True))
    logits = 5 * torch.randn(*micro.tokens.slots_BS.shape, VOCAB, generator=torch.Generator().manual_seed(1))
    labels, mask = micro.tensor(micro.batch.labels_N, 0, CPU), micro.tensor(micro.batch.loss_mask_N, False, CPU)
    grads = []
    for kept in (micro.kept(CPU), None):
        leaf = logits.clone().requires_grad_()
        values = label_log_probs_and_entropy(leaf, labels, kept, temperature=TEMPERATURE, entropy_gradient=True)
        weighted((values[0] * mask, values[1] * mask)).backward()
        grads.append((*(v.detach() * mask for v in values), leaf.grad))
    for found, wanted in zip(*grads, strict=True):
        assert found is not None and wanted is not None
        assert torch.allclose(found, wanted, atol=2e-6)


def test_entropy_without_a_gradient() -> None:
    micro = micro_of(batch_of())
    logits = torch.randn(*micro.tokens.slots_BS.shape, VOCAB, requires_grad=True)
    labels, kept = micro.tensor(micro.batch.labels_N, 0, CPU), micro.kept(CPU)
    log_probs, entropy = label_log_probs_and_entropy(logits, labels, kept, temperature=1.0, entropy_gradient=False)
    assert log_probs.requires_grad and not entropy.requires_grad


@pytest.mark.parametrize("widths", [(7, 6), (12, 1), (3, 5, 5)])
def test_parts_of_the_vocabulary(widths: tuple[int, ...]) -> None:
    """Sets split over ranks, some without an id of a set; the label may be on any of them."""
    micro = micro_of(batch_of(2))
    logits = 5 * torch.randn(*micro.tokens.slots_BS.shape, VOCAB, generator=torch.Generator().manual_seed(4))
    labels, kept = micro.tensor(micro.batch.labels_N, 0, CPU), micro.kept(CPU)
    assert kept is not None
    whole = logits.clone().requires_grad_()
    wanted = kept_log_probs_and_entropy(whole, labels, kept, temperature=TEMPERATURE, entropy_gradient=True)
    weighted(wanted).backward()
    assert whole.grad is not None
    first = 0
    parts = [logits[..., sum(widths[:i]) : sum(widths[: i + 1])].clone().requires_grad_() for i in range(len(widths))]
    found = _on_ranks(parts, labels, kept)
    for part, values in zip(parts, found, strict=True):
        assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(values, wanted, strict=True))
        assert part.grad is not None
        assert torch.allclose(part.grad, whole.grad[..., first : first + part.size(-1)], atol=1e-6)
        first += part.size(-1)


def _on_ranks(parts: list[torch.Tensor], labels: torch.Tensor, kept: KeptSlots) -> list[Any]:
    """Compute each part in a thread of its own, reducing over all threads."""
    barrier, given, found = threading.Barrier(len(parts)), [torch.zeros(0)] * len(parts), [None] * len(parts)

    def run(rank: int) -> None:
        def reduce(values: torch.Tensor, operation: str) -> None:
            given[rank] = values.clone()
            barrier.wait()
            together = torch.stack(given)
            barrier.wait()
            values.copy_(together.sum(0) if operation == "sum" else together.amax(0))

        part = VocabularyPart(sum(p.size(-1) for p in parts[:rank]), reduce)
        values = kept_log_probs_and_entropy(
            parts[rank], labels, kept, temperature=TEMPERATURE, entropy_gradient=True, part=part
        )
        weighted(values).backward()
        found[rank] = tuple(v.detach() for v in values)  # type: ignore[call-overload]

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(len(parts))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


def test_a_set_of_one_is_certain_and_has_no_gradient() -> None:
    batch = replace(batch_of(), kept=None)
    sets = KeptTokens.from_lists([[label] for label in batch.labels_N.tolist()])
    micro = micro_of(replace(batch, kept=sets))
    logits = torch.randn(*micro.tokens.slots_BS.shape, VOCAB, requires_grad=True)
    labels = micro.tensor(micro.batch.labels_N, 0, CPU)
    values = label_log_probs_and_entropy(logits, labels, micro.kept(CPU), temperature=1.0, entropy_gradient=True)
    weighted(values).backward()
    assert not any(v.any() for v in values) and logits.grad is not None and not logits.grad.any()


def test_a_logit_that_is_not_a_number_is_not_hidden() -> None:
    micro = micro_of(batch_of())
    kept = micro.kept(CPU)
    assert kept is not None
    logits = torch.zeros(*micro.tokens.slots_BS.shape, VOCAB)
    logits.view(-1, VOCAB)[kept.slots_J[0], kept.ids_J[0]] = float("nan")
    log_probs, _ = label_log_probs_and_entropy(
        logits, micro.tensor(micro.batch.labels_N, 0, CPU), kept, temperature=1.0, entropy_gradient=False
    )
    assert log_probs.isnan().sum() == 1


def token_values(
    logits: torch.Tensor, labels: torch.Tensor, kept: KeptSlots | None, entropy_gradient: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    return label_log_probs_and_entropy(logits, labels, kept, temperature=TEMPERATURE, entropy_gradient=entropy_gradient)


def _algorithm() -> AlgorithmConfig:
    return algorithm_of(RLVRConfig(exp_name="t", pretrain="x", actor_train={}, actor_infer={}))


def _policy_objective(stats: TokenStats) -> Objective:
    return policy_objective(token_values, CPU, _algorithm(), 1.0, stats, LossSum(), lambda sums: None)


def test_the_objectives_take_the_sets_and_count_them() -> None:
    micro = micro_of(batch_of())
    assert micro.batch.kept is not None
    logits = 3 * torch.randn(*micro.tokens.slots_BS.shape, VOCAB, generator=torch.Generator().manual_seed(5))
    wanted, _ = dense(logits, micro)
    _, (log_probs, _) = log_prob_objective(token_values, CPU)(micro, logits)
    assert torch.allclose(log_probs.double(), wanted, atol=1e-6)
    stats = TokenStats()
    _, (live, _) = _policy_objective(stats)(micro, logits)
    assert torch.equal(live, log_probs)
    figures, mask_N = stats.reduce(), micro.batch.loss_mask_N
    probs = (logits.double() / TEMPERATURE).softmax(-1)
    kept = micro.kept(CPU)
    assert kept is not None
    flat = probs.view(-1, VOCAB)
    masses = torch.zeros(len(flat), dtype=torch.float64).index_add_(0, kept.slots_J, flat[kept.slots_J, kept.ids_J])
    assert figures["sampling_mask/coverage"] == 1
    assert figures["sampling_mask/mean_size"] == pytest.approx(micro.batch.kept.counts_S[mask_N].mean())
    assert figures["sampling_mask/mass"] == pytest.approx(float(masses[masses > 0].mean()), abs=1e-6)


def test_without_sets_the_whole_vocabulary_is_used_and_nothing_is_counted() -> None:
    micro = micro_of(replace(batch_of(), kept=None))
    logits = torch.randn(*micro.tokens.slots_BS.shape, VOCAB)
    stats = TokenStats()
    _, (live, _) = _policy_objective(stats)(micro, logits)
    labels = micro.tensor(micro.batch.labels_N, 0, CPU)
    wanted, _ = label_log_probs_and_entropy(logits, labels, temperature=TEMPERATURE, entropy_gradient=False)
    assert torch.equal(live, wanted)
    assert not any(name.startswith("sampling_mask") for name in stats.reduce())
