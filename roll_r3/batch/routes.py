"""Recorded routes of one sample: the experts of each MoE layer for each of its tokens.

Shape legend: M MoE layers, R rows (processed tokens), K experts per token.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt

from roll_r3.errors import RouteError

RouteArray = npt.NDArray[np.uint8] | npt.NDArray[np.uint16]


def route_dtype(num_experts: int) -> np.dtype[np.uint8] | np.dtype[np.uint16]:
    """Return the smallest unsigned dtype for expert ids in [0, num_experts).

    It follows from the model, never from the ids at hand: two samples of one model always share a dtype.

    Raises:
        RouteError: num_experts is not in [1, 65536].
    """
    if not 1 <= num_experts <= 1 << 16:
        raise RouteError(f"num_experts must be in [1, 65536], not {num_experts}")
    return np.dtype(np.uint8) if num_experts <= 1 << 8 else np.dtype(np.uint16)


@dataclass(frozen=True, eq=False)
class RoutedExperts:
    """Routes of one sample, layer-major, MoE layers only.

    A sample of T tokens has R = T - 1 rows: the last token was sampled but never processed. Row r holds the experts
    used while token r was processed, in the engine's top-k order.

    Example:
        >>> routes = RoutedExperts(np.zeros((4, 11, 2), np.uint8))
        >>> routes.num_layers, routes.num_rows, routes.top_k
        (4, 11, 2)
    """

    ids_MRK: RouteArray
    """Expert ids, `uint8` or `uint16` (see `route_dtype`), [M, R, K]."""
    known_R: npt.NDArray[np.bool_] | None = field(default=None)
    """False where the engine never processed the token, as in tool output: the live router decides there. None if every
    row is known.
    """

    def __post_init__(self) -> None:
        if self.ids_MRK.ndim != 3 or self.ids_MRK.dtype not in (np.uint8, np.uint16):
            raise RouteError(
                f"routes are uint8 or uint16 [MoE layers, rows, top_k], not {self.ids_MRK.dtype} "
                f"{list(self.ids_MRK.shape)}"
            )
        if self.known_R is not None and self.known_R.shape != (self.num_rows,):
            raise RouteError(f"known_R has shape {self.known_R.shape}, but there are {self.num_rows} rows")

    @property
    def num_layers(self) -> int:
        return int(self.ids_MRK.shape[0])

    @property
    def num_rows(self) -> int:
        return int(self.ids_MRK.shape[1])

    @property
    def top_k(self) -> int:
        return int(self.ids_MRK.shape[2])

    @property
    def dtype(self) -> np.dtype[Any]:
        return self.ids_MRK.dtype

    def after_unknown(self, rows: int) -> RoutedExperts:
        """Return these rows behind the given number of unknown ones."""
        if not rows:
            return self
        unknown_MrK = np.zeros((self.num_layers, rows, self.top_k), self.dtype)
        known_R = np.ones(self.num_rows, np.bool_) if self.known_R is None else self.known_R
        return RoutedExperts(
            np.concatenate([unknown_MrK, self.ids_MRK], axis=1), np.concatenate([np.zeros(rows, np.bool_), known_R])
        )

    @property
    def nbytes(self) -> int:
        """Bytes held, the mask of known rows included."""
        return self.ids_MRK.nbytes + (0 if self.known_R is None else self.known_R.nbytes)


@runtime_checkable
class RouteHandle(Protocol):
    """Place of a sample's routes, for a process that schedules them and need not hold them."""

    @property
    def num_layers(self) -> int: ...

    @property
    def num_rows(self) -> int: ...

    @property
    def top_k(self) -> int: ...

    @property
    def dtype(self) -> np.dtype[Any]: ...

    @property
    def nbytes(self) -> int:
        """Bytes of the sample in its place; parts shared by samples are counted once over all of them."""
        ...


Routes = RoutedExperts | RouteHandle
