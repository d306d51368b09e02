"""Coordinates of every rank and groups of ranks, by arithmetic.

The ranks of a role form two grids: one for experts, one for everything else. In both, ranks of the first axis are
adjacent and pipeline stages are outermost: megatron-core's default order "tp-cp-ep-dp-pp".
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import product

from roll_r3.config.derived import ModelWorker, data_parallel_size, expert_layout, layout, runs_megatron


@dataclass(frozen=True)
class Place:
    """Coordinates of a rank."""

    tp: int
    cp: int
    dp: int
    pp: int
    etp: int
    ep: int
    edp: int
    """Number among the ranks with the same part of the same experts."""


@dataclass(frozen=True)
class Grid:
    """Sizes of a role's parallel groups."""

    tp: int
    cp: int
    dp: int
    pp: int
    etp: int
    ep: int
    edp: int
    """Number of copies of each expert."""

    @classmethod
    def of(cls, worker: ModelWorker) -> Grid:
        """Return the grid of a role. Its devices must divide. Under FSDP2 all ranks are data-parallel."""
        if not runs_megatron(worker):
            ranks = data_parallel_size(worker)
            return cls(tp=1, cp=1, dp=ranks, pp=1, etp=1, ep=1, edp=ranks)
        m = layout(worker)
        etp, ep, pp = expert_layout(worker)
        return cls(
            tp=m.tensor_model_parallel_size,
            cp=m.context_parallel_size,
            dp=data_parallel_size(worker),
            pp=pp,
            etp=etp,
            ep=ep,
            edp=len(worker.device_mapping) // (etp * ep * pp),
        )

    def places(self) -> tuple[Place, ...]:
        """Return the coordinates of each rank."""
        pairs = zip(self._coordinates(_DENSE), self._coordinates(_EXPERT), strict=True)
        return tuple(Place(**(dense | expert)) for dense, expert in pairs)

    def groups(self, *axes: str) -> tuple[tuple[int, ...], ...]:
        """Return groups of ranks that differ only in these axes, ascending, ordered by first rank.

        Args:
            axes: fields of `Place`, all of one grid.
        """
        order = _DENSE if set(axes) <= set(_DENSE) else _EXPERT
        assert set(axes) <= set(order), f"{axes} belong to two grids"
        found: dict[tuple[int, ...], list[int]] = {}
        for rank, at in enumerate(self._coordinates(order)):
            found.setdefault(tuple(at[axis] for axis in order if axis not in axes), []).append(rank)
        return tuple(map(tuple, found.values()))

    def _coordinates(self, order: tuple[str, ...]) -> Iterator[dict[str, int]]:
        """Yield the coordinates of each rank in one grid; the first axis runs fastest."""
        sizes = asdict(self)
        for at in product(*(range(sizes[axis]) for axis in reversed(order))):
            yield dict(zip(order, reversed(at), strict=True))


_DENSE = ("tp", "cp", "dp", "pp")
_EXPERT = ("etp", "ep", "edp", "pp")
