"""The samples of a step in training form: jagged arrays with one entry per model input.

A sample of T tokens feeds its first T - 1 tokens to the model. Input p predicts token p + 1, and route row p holds the
experts of input p. Everything per token is aligned to inputs, so nothing is shifted later. Shape legend: n samples,
N = sum of `lengths` inputs of all samples.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import TypeVar

import numpy as np
import numpy.typing as npt

from roll_r3.batch.kept_tokens import KeptTokens
from roll_r3.batch.routes import Routes
from roll_r3.batch.trajectory import Trajectory

Scalar = TypeVar("Scalar", bound=np.generic)
"""Element type of an array that is only rearranged."""
FloatN = npt.NDArray[np.float32]


@dataclass(frozen=True, eq=False)
class Batch:
    """Samples of one step, or of one data-parallel shard of it.

    Example (two samples of 3 and 2 tokens): `lengths` is [2, 1], `input_ids_N` has 3 entries, and the label of
    the last input of each sample is its last token.
    """

    sample_ids: tuple[str, ...]
    lengths_n: npt.NDArray[np.int64]
    """Inputs of each sample: its tokens less one."""
    input_ids_N: npt.NDArray[np.int64]
    labels_N: npt.NDArray[np.int64]
    """The token after each input."""
    loss_mask_N: npt.NDArray[np.bool_]
    """True where the policy sampled the label, which is trained on."""
    rollout_log_probs_N: FloatN
    """The engine's log-probability of each label, nats; 0 where `loss_mask_N` is False."""
    routes: tuple[Routes, ...] | None = None
    """Per sample, one row per input; None when nothing was recorded."""
    advantages_N: FloatN | None = None
    """Filled by the pipeline; 0 where `loss_mask_N` is False."""
    old_log_probs_N: FloatN | None = None
    """Filled by the trainer's pass before the update, or the rollout's (`rollout_correction.bypass`); None in an update
    whose ratio is 1 (`force_on_policy_ratio`)."""
    ref_log_probs_N: FloatN | None = None
    """Filled by the reference."""
    pg_weights_N: FloatN | None = None
    """Weight of each label's policy-gradient loss, from corrections between rollout and trainer and from choices of
    tokens. It has no gradient, and KL and entropy terms do not see it. None: 1 everywhere."""
    scores_n: FloatN | None = None
    """Score of each sample, before shaping and normalisation; 0 for fillers. None before scoring."""
    kept: KeptTokens | None = None
    """Set of tokens that each label was sampled from, empty where none was; None: log-probabilities and entropies are
    of the whole vocabulary."""
    versions_N: npt.NDArray[np.int32] | None = None
    """Weight version that sampled each label, -1 where none did; None for a batch made without trajectories."""

    @property
    def num_samples(self) -> int:
        return len(self.sample_ids)

    @property
    def offsets(self) -> npt.NDArray[np.int64]:
        """Start of each sample in the jagged arrays, and N at the end: int64 [n + 1]."""
        return np.concatenate([np.zeros(1, np.int64), np.cumsum(self.lengths_n)])

    @classmethod
    def from_trajectories(cls, trajectories: Sequence[Trajectory]) -> Batch:
        """Lay trajectories out for training; routes are carried along as they are (arrays or handles)."""
        routes = [t.routes for t in trajectories if t.routes is not None]
        if routes and len(routes) != len(trajectories):
            raise ValueError(f"{len(trajectories) - len(routes)} of {len(trajectories)} trajectories carry no routes")
        kept = [inputs for t in trajectories if (inputs := t.kept_inputs) is not None]
        if kept and len(kept) != len(trajectories):
            raise ValueError(
                f"{len(trajectories) - len(kept)} of {len(trajectories)} trajectories carry no kept tokens"
            )
        return cls(
            sample_ids=tuple(t.sample_id for t in trajectories),
            lengths_n=np.array([t.num_tokens - 1 for t in trajectories], np.int64),
            input_ids_N=np.concatenate([t.token_ids_T[:-1] for t in trajectories]).astype(np.int64),
            labels_N=np.concatenate([t.token_ids_T[1:] for t in trajectories]).astype(np.int64),
            loss_mask_N=np.concatenate([t.sampled_T[1:] for t in trajectories]),
            rollout_log_probs_N=np.concatenate([t.log_probs_T[1:] for t in trajectories]),
            versions_N=np.concatenate([t.versions_T[1:] for t in trajectories]),
            routes=tuple(routes) or None,
            kept=KeptTokens.concatenate(kept) if kept else None,
        )

    def per_sample(self, values_n: npt.NDArray[Scalar]) -> npt.NDArray[Scalar]:
        """Spread one value per sample over that sample's inputs: [n] -> [N]."""
        return np.repeat(values_n, self.lengths_n)

    def sum_per_sample(self, values_N: npt.NDArray[np.generic]) -> npt.NDArray[np.float64]:
        """Sum over each sample's inputs: [N] -> float64 [n]."""
        rows_N = np.repeat(np.arange(self.num_samples), self.lengths_n)
        sums_n = np.bincount(rows_N, weights=values_N.astype(np.float64), minlength=self.num_samples)
        return sums_n.astype(np.float64, copy=False)

    def inputs_of(self, samples: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Places of the samples' inputs in the jagged arrays, sample after sample in the order given."""
        offsets = self.offsets
        return np.concatenate([np.arange(offsets[i], offsets[i + 1]) for i in samples]) if len(samples) else samples

    def select(self, samples: npt.ArrayLike) -> Batch:
        """The given samples (indices, in the order given) as a batch of their own."""
        index = np.asarray(samples, np.int64)
        inputs = self.inputs_of(index)
        changes: dict[str, object] = {}
        for f in fields(self):
            value = getattr(self, f.name)
            if value is None:
                continue
            if isinstance(value, KeptTokens):
                changes[f.name] = value.select(inputs)
            elif f.name.endswith("_N"):
                changes[f.name] = value[inputs]
            elif f.name.endswith("_n"):
                changes[f.name] = value[index]
            else:
                changes[f.name] = tuple(value[i] for i in index)
        return replace(self, **changes)  # type: ignore[arg-type]

    def filled_up(self, multiple: int) -> Batch:
        """Add copies of the shortest sample, untrained, until the number of samples divides by `multiple`.

        Needed when samples were dropped: every rank still gets an equal number, and no loss changes.
        """
        missing = -self.num_samples % multiple
        if not missing:
            return self
        chosen = np.concatenate([np.arange(self.num_samples), np.full(missing, int(self.lengths_n.argmin()))])
        grown = self.select(chosen)
        mask_N = grown.loss_mask_N.copy()
        mask_N[len(self.input_ids_N) :] = False
        names = tuple(f"filler{i}" for i in range(missing))
        return replace(grown, loss_mask_N=mask_N, sample_ids=self.sample_ids + names)
