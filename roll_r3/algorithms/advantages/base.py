"""Form of an estimator: normalised rewards of samples from their shaped scores.

Shape legend: n samples.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from roll_r3.config.algorithm import AlgorithmConfig

Float64n = npt.NDArray[np.float64]
Members = npt.NDArray[np.int64]
"""Places of the samples of one group, or of one domain."""


@dataclass(frozen=True, eq=False)
class ScoredSamples:
    """Shaped scores of a step's samples, with their groups and domains; masked samples included, fillers not."""

    scores_n: Float64n
    groups: tuple[Members, ...]
    """Each with at least one sample. Dropped samples make them unequal."""
    domains: tuple[Members, ...]

    @classmethod
    def of(cls, scores_n: Float64n, groups: Sequence[str], domains: Sequence[str]) -> ScoredSamples:
        """Collect the members of each group and domain from the name of each sample's."""
        return cls(scores_n, members_of(groups), members_of(domains))


def members_of(names: Sequence[str]) -> tuple[Members, ...]:
    """Return the places of each name, in the order of places."""
    _, index = np.unique(np.asarray(names), return_inverse=True)
    return tuple(np.flatnonzero(index == part) for part in range(index.max(initial=-1) + 1))


@dataclass(frozen=True)
class Estimator:
    """One value of `adv_estimator`."""

    name: str
    rewards: Callable[[ScoredSamples, AlgorithmConfig], Float64n]
    """Normalised reward of each sample (float64 [n]): its advantage before the KL penalty, whitening and clips."""
    whitens_step: bool = False
    """Whiten the advantages of all trained tokens of the step."""
