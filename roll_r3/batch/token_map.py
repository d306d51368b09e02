"""Token map: the (sample, input) in each local token slot of a rank.

Padding, packing, the context-parallel zig-zag and the sequence-parallel chunk are different ways to make one integer
vector. Token ids, labels, positions, masks, log-probabilities and routed experts of a micro-batch are all gathered
through this vector. Routes cannot drift from tokens, because no second layout code exists for them.

Sizes and ranks are arguments, never globals: every layout can be computed in one process.

Shape legend: n samples of the micro-batch, N their inputs (jagged, see `batch.py`), B x S the padded grid of this
rank (B = 1 when packed), t tokens seen by this rank's routers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import numpy.typing as npt

Scalar = TypeVar("Scalar", bound=np.generic)
"""Element type of a gathered or scattered array; input and output share it."""
IntArray = npt.NDArray[np.int64]

PADDING = -1
"""Slot value of a padding token."""


@dataclass(frozen=True)
class Layout:
    """Layout of a micro-batch over the ranks sharing it."""

    packed: bool = False
    """True: all samples end to end in one row ("thd"); False: one padded row per sample ("bshd")."""
    cp_size: int = 1
    cp_rank: int = 0
    sp_size: int = 1
    """Number of ranks splitting the sequence between transformer blocks: TP size under sequence parallelism, else 1."""
    sp_rank: int = 0
    multiple: int = 1
    """Every rank sharing a row (padded) or a sample (packed) holds a multiple of this number of its tokens."""
    batch_outer: bool = False
    """Routers see row after row (transformers); False: position after position of all rows (Megatron)."""

    def __post_init__(self) -> None:
        for name in ("cp", "sp"):
            size, rank = getattr(self, f"{name}_size"), getattr(self, f"{name}_rank")
            if not 0 <= rank < size:
                raise ValueError(f"{name}_rank must be in [0, {name}_size), got {rank} of {size}")
        if self.multiple < 1:
            raise ValueError(f"multiple must be 1 or more, got {self.multiple}")

    @property
    def alignment(self) -> int:
        """Number of tokens; every row (padded) or sample (packed) takes a multiple of it over all ranks.

        The zig-zag cuts a sequence into 2 * cp pieces; the sequence-parallel chunk then cuts each rank's part. Each
        piece's share of a chunk is a multiple of `multiple`, and so is each rank's share of the sequence.
        """
        return self.sp_size * (2 * self.cp_size if self.cp_size > 1 else 1) * self.multiple


@dataclass(frozen=True, eq=False)
class TokenMap:
    """The slots of one micro-batch on one rank."""

    slots_BS: IntArray
    """Index of each local token in the micro-batch's jagged arrays, or `PADDING`. [B, S]"""
    positions_BS: IntArray
    """Position of each local token in its own sequence, counted on through padding. [B, S]"""
    router_slots_t: IntArray
    """`slots_BS` in the routers' order on this rank: `Layout.batch_outer`, then the sequence-parallel chunk."""
    cu_seqlens: npt.NDArray[np.int32] | None
    """Packed only: start of each sample in the whole packed row (all CP ranks, padding included). [n + 1]"""
    num_inputs: int
    """N, over all ranks."""

    @property
    def seen(self) -> npt.NDArray[np.bool_]:
        """Mask of the inputs seen by this rank's routers. [N]"""
        seen_N = np.zeros(self.num_inputs, np.bool_)
        seen_N[self.router_slots_t[self.router_slots_t != PADDING]] = True
        return seen_N

    def gather(self, values_N: npt.NDArray[Scalar], fill: float | int | bool) -> npt.NDArray[Scalar]:
        """Local view of a jagged array: [N, ...] -> [B, S, ...], `fill` in padding slots."""
        return gather_slots(values_N, self.slots_BS, fill)

    def scatter(self, values_BS: npt.NDArray[Scalar]) -> npt.NDArray[Scalar]:
        """Inverse of `gather`: [B, S, ...] -> [N, ...] with zeros for inputs of other ranks.

        Exactly one context-parallel rank holds each input, so the sum over this group is the whole array.
        """
        out = np.zeros((self.num_inputs, *values_BS.shape[2:]), values_BS.dtype)
        held = self.slots_BS != PADDING
        out[self.slots_BS[held]] = values_BS[held]
        return out


def gather_slots(values_N: npt.NDArray[Scalar], slots: IntArray, fill: float | int | bool) -> npt.NDArray[Scalar]:
    """`values_N[slots]` with `fill` where a slot is `PADDING`: [N, ...] -> [*slots.shape, ...]."""
    held = slots != PADDING
    if len(values_N) == 0:
        return np.full((*slots.shape, *values_N.shape[1:]), fill, values_N.dtype)
    out = values_N[np.where(held, slots, 0)]
    out[~held] = fill
    return out


def round_up(value: int, multiple: int) -> int:
    """The smallest multiple of `multiple`, `value` or above."""
    return -(-value // multiple) * multiple


def zigzag_positions(length: int, cp_size: int, cp_rank: int) -> IntArray:
    """Positions of one sequence held by a context-parallel rank, in its order.

    The sequence is cut into 2 * cp pieces and rank r holds pieces r and 2 * cp - 1 - r. Causal attention then costs
    each rank the same (Megatron's and TransformerEngine's order). `length` is a multiple of 2 * cp_size.
    """
    if cp_size == 1:
        return np.arange(length, dtype=np.int64)
    piece = length // (2 * cp_size)
    first = np.arange(piece, dtype=np.int64)
    return np.concatenate([cp_rank * piece + first, (2 * cp_size - 1 - cp_rank) * piece + first])


def build_token_map(lengths_n: Sequence[int] | IntArray, layout: Layout, *, pad_to: int = 0) -> TokenMap:
    """Lay out a micro-batch on the rank named by `layout`.

    Args:
        lengths_n: inputs of each sample, every one at least 1.
        layout: packing, and this rank's place in its context- and sequence-parallel groups.
        pad_to: minimum number of tokens per row (padded) or in the whole packed row; rounded up to the alignment.

    Raises:
        ValueError: no samples, or an empty one.
    """
    lengths = np.asarray(lengths_n, np.int64)
    if len(lengths) == 0 or lengths.min() < 1:
        raise ValueError(f"a micro-batch needs samples of at least one input, got lengths {lengths.tolist()}")
    starts = np.cumsum(lengths) - lengths
    if layout.packed:
        padded = [round_up(int(n), layout.alignment) for n in lengths]
        spare = round_up(pad_to, layout.alignment) - sum(padded)
        if spare > 0:  # a tail outside of all samples, attended only by itself
            padded.append(spare)
        rows = [_row(starts, lengths, padded, layout)]
        cu_seqlens = np.concatenate([[0], np.cumsum(padded)]).astype(np.int32)
    else:
        width = round_up(max(int(lengths.max()), pad_to), layout.alignment)
        rows = [_row(starts[i : i + 1], lengths[i : i + 1], [width], layout) for i in range(len(lengths))]
        cu_seqlens = None
    slots_BS = np.stack([slots for slots, _ in rows])
    in_order = slots_BS if layout.batch_outer else slots_BS.T
    router_slots = in_order.reshape(layout.sp_size, -1)[layout.sp_rank]
    return TokenMap(
        slots_BS=slots_BS,
        positions_BS=np.stack([positions for _, positions in rows]),
        router_slots_t=np.ascontiguousarray(router_slots),
        cu_seqlens=cu_seqlens,
        num_inputs=int(lengths.sum()),
    )


def _row(starts: IntArray, lengths: IntArray, padded: Sequence[int], layout: Layout) -> tuple[IntArray, IntArray]:
    """Slots and positions of one row: the given samples, each padded to its size, end to end."""
    slots, positions = [], []
    for i, size in enumerate(padded):
        position = zigzag_positions(size, layout.cp_size, layout.cp_rank)
        start, length = (int(starts[i]), int(lengths[i])) if i < len(lengths) else (0, 0)
        slots.append(np.where(position < length, start + position, PADDING))
        positions.append(position)
    return np.concatenate(slots), np.concatenate(positions)
