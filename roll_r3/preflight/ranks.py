"""Every rank's place and every group of ranks, as arithmetic.

Two grids lie over the ranks of a role: one for all that is no expert, one for experts. In both the ranks of the first
axis are next to each other and pipeline stages are outermost: megatron-core's default order "tp-cp-ep-dp-pp".
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import product

from roll_r3.config.derived import ModelWorker, data_parallel_size, expert_layout, layout, runs_megatron


@dataclass(frozen=True)
class Place:
    """A rank's coordinates."""

    tp: int
    cp: int
    dp: int
    pp: int
    etp: int
    ep: int
    edp: int
    """Among the ranks that hold the same part of the same experts."""


@dataclass(frozen=True)
class Grid:
    """The sizes of a role's parallel groups."""

    tp: int
    cp: int
    dp: int
    pp: int
    etp: int
    ep: int
    edp: int
    """Copies of each expert."""

    @classmethod
    def of(cls, worker: ModelWorker) -> Grid:
        """The grid of a role whose devices divide. Under FSDP2 every rank is a data-parallel one."""
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
        """Where each rank is."""
        pairs = zip(self._coordinates(_DENSE), self._coordinates(_EXPERT), strict=True)
        return tuple(Place(**(dense | expert)) for dense, expert in pairs)

    def groups(self, *axes: str) -> tuple[tuple[int, ...], ...]:
        """Ranks that differ in these axes alone, ascending; groups by their first rank.

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
        """Of each rank in one grid, whose first axis runs fastest."""
        sizes = asdict(self)
        for at in product(*(range(sizes[axis]) for axis in reversed(order))):
            yield dict(zip(order, reversed(at), strict=True))


_DENSE = ("tp", "cp", "dp", "pp")
_EXPERT = ("etp", "ep", "edp", "pp")
