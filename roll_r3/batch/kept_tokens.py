"""Tokens kept by truncated sampling: for each sampled token, the part of the vocabulary that the engine chose from.

Shape legend: S rows, one per token or per input; J ids of all rows together.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

IntArray = npt.NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class KeptTokens:
    """A set of token ids per row, in one array (CSR). An empty set belongs to a row without a sampled token.

    Example (rows of two ids, none, and one id):
        >>> kept = KeptTokens.from_lists([[7, 3], [], [5]])
        >>> kept.counts_S.tolist(), kept.ids_J.tolist(), kept.select(np.array([2, 0])).ids_J.tolist()
        ([2, 0, 1], [7, 3, 5], [5, 7, 3])
    """

    counts_S: npt.NDArray[np.int32]
    """Number of ids of each row."""
    ids_J: npt.NDArray[np.int32]
    """Ids, row after row."""

    def __post_init__(self) -> None:
        """Raise ValueError unless both are int32 vectors, and the counts are those of the ids."""
        for name, array in (("counts_S", self.counts_S), ("ids_J", self.ids_J)):
            if array.dtype != np.int32 or array.ndim != 1:
                raise ValueError(f"{name} must be an int32 vector, got {array.dtype} {list(array.shape)}")
        if (self.counts_S < 0).any() or self.counts_S.sum(dtype=np.int64) != len(self.ids_J):
            raise ValueError(f"counts of {self.num_rows} sets do not add up to {len(self.ids_J)} ids")

    @classmethod
    def from_lists(cls, rows: Sequence[Sequence[int]]) -> KeptTokens:
        """Return the sets given as lists.

        Raises:
            OverflowError: an id outside int32.
        """
        ids = [token for row in rows for token in row]
        return cls(np.array([len(row) for row in rows], np.int32), np.array(ids, np.int32))

    @classmethod
    def concatenate(cls, parts: Sequence[KeptTokens]) -> KeptTokens:
        """Return the rows of all parts, one part after the other."""
        return cls(np.concatenate([part.counts_S for part in parts]), np.concatenate([part.ids_J for part in parts]))

    @property
    def num_rows(self) -> int:
        return len(self.counts_S)

    @property
    def nbytes(self) -> int:
        return self.counts_S.nbytes + self.ids_J.nbytes

    @property
    def row_of_id(self) -> IntArray:
        """Row of each id."""
        return np.repeat(np.arange(self.num_rows), self.counts_S)

    def select(self, rows: IntArray) -> KeptTokens:
        """Return the given rows, in the order given."""
        ends = np.cumsum(self.counts_S, dtype=np.int64)
        counts = self.counts_S[rows]
        first = ends[rows] - counts
        shift = first - (np.cumsum(counts, dtype=np.int64) - counts)
        return KeptTokens(counts, self.ids_J[np.arange(counts.sum(dtype=np.int64)) + np.repeat(shift, counts)])

    def spread(self, at: IntArray, num_rows: int) -> KeptTokens:
        """Return `num_rows` rows: these at the ascending places `at`, empty ones elsewhere."""
        counts = np.zeros(num_rows, np.int32)
        counts[at] = self.counts_S
        return KeptTokens(counts, self.ids_J)
