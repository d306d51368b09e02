"""The wire form of routes: one contiguous buffer for the samples of a prompt. docs/wire_format.md specifies every byte.

Expert ids are stored layer after layer, so the layers of a pipeline stage are one block. Within a layer they are stored
row after row, so a slice of a sequence is one run. Leading rows shared by all samples of the group (usually the
prompt's) are stored once. A reader of some layers of some samples gets views of the buffer, and verifies their
checksums only.

Nothing read from a buffer is trusted before its check. Truncated, changed or forged buffers raise `RouteError`, and the
buffer's own length bounds every allocation.

Shape legend: M MoE layers, L a run of them, K experts per token, n samples, T stored rows, P of them shared, R rows of
a sample, Q of them its own (R = P + Q).
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from roll_r3.batch.routes import RouteArray, RoutedExperts, route_dtype
from roll_r3.batch.token_map import round_up
from roll_r3.errors import RouteError

MAGIC = b"R3ROUTES"
VERSION = 1
HAS_UNKNOWN_ROWS = 1
"""Flag: the buffer has a mask of known rows."""
FIXED = struct.Struct("<8s6HIQII")
"""Magic, version, flags, M, K, n, 0, number of experts, total length, checksum of everything before the ids, 0."""
SUM_AT = 32
"""Offset of the checksum; its own four bytes are excluded from it."""
ALIGNMENT = 64
"""Alignment of the first id, in bytes from the buffer's start."""
COUNT_LIMIT = (1 << 16) - 1
"""Maximum of M, K and n."""
DECODE_LIMIT = 1 << 32
"""Default maximum of bytes of all arrays of a group."""

Buffer = bytes | bytearray | memoryview | npt.NDArray[np.uint8]


@dataclass(frozen=True, eq=False)
class RouteView:
    """Routes of one sample in some layers: read-only views of the encoding."""

    shared_LPK: RouteArray
    """Leading rows shared with the group."""
    own_LQK: RouteArray
    shared_known_P: npt.NDArray[np.bool_] | None
    """False where the engine never processed the token; None when every row of the group is known."""
    own_known_Q: npt.NDArray[np.bool_] | None


def encode(samples: Sequence[RoutedExperts], num_experts: int) -> npt.NDArray[np.uint8]:
    """Encode one group's routes.

    Leading rows equal in every sample, layer and known mask are stored once. They are compared, because an engine may
    compute a prompt once per sample and route it differently each time.

    Args:
        samples: routes of one model, in the order of later requests.
        num_experts: ids are in [0, num_experts), and the dtype is `route_dtype` of it.

    Returns:
        uint8 [bytes].

    Raises:
        RouteError: no samples, samples of several shapes or dtypes, an id out of range, or more layers, experts per
            token or samples than the format counts (65,535) or rows (4,294,967,295).
    """
    _check_encodable(samples, num_experts)
    first = samples[0]
    dtype, layers, top_k = first.ids_MRK.dtype, first.num_layers, first.top_k
    shared = _shared_rows(samples)
    rows = [shared, *(s.num_rows - shared for s in samples)]
    known_T = _stored_known(samples, shared)
    mask = np.zeros(0, np.uint8) if known_T.all() else np.packbits(known_T, bitorder="little")
    sums_at = FIXED.size + 4 * len(rows)
    mask_at = sums_at + 4 * len(rows) * layers
    ids_at = round_up(mask_at + len(mask), ALIGNMENT)
    out = np.empty(ids_at + layers * sum(rows) * top_k * dtype.itemsize, np.uint8)
    ids_MTK = out[ids_at:].view(dtype).reshape(layers, sum(rows), top_k)
    ids_MTK[:, :shared] = first.ids_MRK[:, :shared]
    ends = np.cumsum(rows).tolist()
    for sample, start, end in zip(samples, ends, ends[1:], strict=False):
        ids_MTK[:, start:end] = sample.ids_MRK[:, shared:]
    sums = [[zlib.crc32(ids_TK[end - n : end].data) for n, end in zip(rows, ends, strict=True)] for ids_TK in ids_MTK]
    flags = HAS_UNKNOWN_ROWS if len(mask) else 0
    fixed = FIXED.pack(MAGIC, VERSION, flags, layers, top_k, len(samples), 0, num_experts, len(out), 0, 0)
    head = b"".join([fixed, np.array(rows, "<u4").tobytes(), np.array(sums, "<u4").tobytes(), mask.tobytes()])
    head = head.ljust(ids_at, b"\0")
    out[:ids_at] = np.frombuffer(head, np.uint8)
    out[SUM_AT : SUM_AT + 4] = np.array([_head_sum(memoryview(head))], "<u4").view(np.uint8)
    return out


def decode(buffer: Buffer, *, max_bytes: int = DECODE_LIMIT) -> tuple[RoutedExperts, ...]:
    """Decode every sample's routes into separate arrays, with all checksums verified.

    Args:
        buffer: result of `encode`.
        max_bytes: maximum size of all arrays. Shared rows are repeated for each sample, so the arrays can be many
            times larger than the buffer.

    Raises:
        RouteError: the encoding is damaged, or the arrays would exceed `max_bytes`.
    """
    group = EncodedGroup(buffer)
    needed = sum(group.num_rows(i) for i in range(group.num_samples)) * (group.row_bytes * group.num_layers + 1)
    if needed > max_bytes:
        raise RouteError(f"the routes take {needed} bytes when decoded, but at most {max_bytes} are allowed")
    views = group.view(range(group.num_layers), range(group.num_samples))
    return tuple(RoutedExperts(np.concatenate([v.shared_LPK, v.own_LQK], axis=1), _whole_known(v)) for v in views)


def _whole_known(view: RouteView) -> npt.NDArray[np.bool_] | None:
    if view.shared_known_P is None or view.own_known_Q is None:
        return None
    known_R = np.concatenate([view.shared_known_P, view.own_known_Q])
    return None if known_R.all() else known_R


class EncodedGroup:
    """An encoding read in place. Opening it checks everything except the ids, without reading them.

    Example:
        group = EncodedGroup(buffer)
        for view in group.view(layers=range(24, 48), samples=[0, 3]):
            ...
    """

    num_experts: int
    num_layers: int
    top_k: int
    num_samples: int
    dtype: np.dtype[np.uint8] | np.dtype[np.uint16]
    stored_rows: list[int]
    """Number of shared rows (P), then of each sample's own (Q)."""

    def __init__(self, buffer: Buffer) -> None:
        """
        Raises:
            RouteError: not an encoding of a supported version, a damaged head, or a wrong length.
        """
        try:
            data = np.frombuffer(buffer, np.uint8)
        except ValueError as error:  # not one run of memory
            raise RouteError(f"these bytes are not encoded routes: {error}") from error
        data.flags.writeable = False
        if len(data) < FIXED.size:
            raise RouteError(f"encoded routes are truncated: {len(data)} bytes, but the head alone takes {FIXED.size}")
        magic, version, flags, layers, top_k, samples, zero, experts, length, head_sum, zeros = FIXED.unpack_from(
            data.data
        )
        if magic != MAGIC:
            raise RouteError("these bytes are not encoded routes: they do not begin with R3ROUTES")
        if version != VERSION:
            raise RouteError(f"encoded routes of version {version}: this program reads version {VERSION}")
        if flags & ~HAS_UNKNOWN_ROWS:
            raise RouteError(f"encoded routes have flags unknown to version {VERSION}: {flags:#x}")
        if not (layers and samples and 1 <= top_k <= experts):
            raise RouteError(
                f"encoded routes are invalid: {layers} layers, {samples} samples, {top_k} of {experts} experts each"
            )
        self.dtype = route_dtype(experts)
        # Python's integers: no product of hostile counts wraps around
        sums_at = FIXED.size + 4 * (samples + 1)
        mask_at = sums_at + 4 * (samples + 1) * layers
        if mask_at > len(data):
            raise RouteError(f"encoded routes are truncated: {len(data)} bytes, but their tables end at {mask_at}")
        rows = data[FIXED.size : sums_at].view("<u4").tolist()
        mask_bytes = -(-sum(rows) // 8) if flags & HAS_UNKNOWN_ROWS else 0
        ids_at = round_up(mask_at + mask_bytes, ALIGNMENT)
        expected = ids_at + layers * sum(rows) * top_k * self.dtype.itemsize
        if not expected == length == len(data):
            raise RouteError(
                f"encoded routes are {len(data)} bytes long, but their head states {length} and their counts require "
                f"{expected}"
            )
        if _head_sum(data[:ids_at].data) != head_sum:
            raise RouteError("encoded routes are damaged: the checksum of their head is wrong")
        mask = data[mask_at : mask_at + mask_bytes]
        spare_bits = int(mask[-1]) >> (sum(rows) % 8 or 8) if mask_bytes else 0
        if zero or zeros or spare_bits or data[mask_at + mask_bytes : ids_at].any():
            raise RouteError("encoded routes are damaged: reserved bytes are not zero")
        self.num_layers, self.top_k, self.num_samples, self.num_experts = layers, top_k, samples, experts
        self.stored_rows = rows
        self._ends = np.cumsum(rows).tolist()
        self._sums = data[sums_at:mask_at].view("<u4").reshape(layers, samples + 1)
        self._ids_MTK: RouteArray = data[ids_at:].view(self.dtype).reshape(layers, sum(rows), top_k)
        self._known_T: npt.NDArray[np.bool_] | None = None
        if mask_bytes:
            bits = np.unpackbits(mask, count=sum(rows), bitorder="little")
            self._known_T = bits.view(np.bool_)

    @property
    def row_bytes(self) -> int:
        """Size of one row in one layer."""
        return self.top_k * self.dtype.itemsize

    def num_rows(self, sample: int) -> int:
        """R, the shared rows included."""
        return self.stored_rows[0] + self.stored_rows[sample + 1]

    def view(self, layers: range, samples: Sequence[int]) -> tuple[RouteView, ...]:
        """Routes of the given samples in the given layers, in the order given, without a copy.

        Args:
            layers: a run of consecutive layers, counted on axis M.
            samples: indices in the group.

        Raises:
            RouteError: requested ids do not match their checksums, or are out of range.
            IndexError: layers or samples outside the group.
        """
        if layers.step != 1 or not 0 <= layers.start <= layers.stop <= self.num_layers:
            raise IndexError(f"{layers} is not a run of {self.num_layers} layers")
        if any(not 0 <= sample < self.num_samples for sample in samples):
            raise IndexError(f"samples {list(samples)} are not all in a group of {self.num_samples}")
        if not samples:
            return ()
        shared_LPK, shared_known_P = self._segment(layers, 0), self._known(0)
        return tuple(
            RouteView(shared_LPK, self._segment(layers, i + 1), shared_known_P, self._known(i + 1)) for i in samples
        )

    def _segment(self, layers: range, segment: int) -> RouteArray:
        """Checked ids of the shared rows (segment 0) or of sample `segment - 1`. [L, P | Q, K]"""
        end = self._ends[segment]
        ids_LQK = self._ids_MTK[layers.start : layers.stop, end - self.stored_rows[segment] : end]
        what = f"sample {segment - 1}" if segment else "the shared rows"
        for layer, ids_QK in zip(layers, ids_LQK, strict=True):
            if zlib.crc32(ids_QK.data) != self._sums[layer, segment]:
                raise RouteError(f"encoded routes are damaged: the checksum of {what} in MoE layer {layer} is wrong")
        if (largest := int(ids_LQK.max(initial=0))) >= self.num_experts:
            raise RouteError(f"encoded routes name expert {largest} in {what}, but there are {self.num_experts}")
        return ids_LQK

    def _known(self, segment: int) -> npt.NDArray[np.bool_] | None:
        if self._known_T is None:
            return None
        end = self._ends[segment]
        return self._known_T[end - self.stored_rows[segment] : end]


def _check_encodable(samples: Sequence[RoutedExperts], num_experts: int) -> None:
    if not samples:
        raise RouteError("there are no routes to encode")
    first = samples[0]
    counts = {"MoE layers": first.num_layers, "experts per token": first.top_k, "samples": len(samples)}
    for name, count in counts.items():
        if not 1 <= count <= COUNT_LIMIT:
            raise RouteError(f"routes of {count} {name} cannot be encoded: 1 to {COUNT_LIMIT} can")
    wanted = (route_dtype(num_experts), first.num_layers, first.top_k)
    if first.top_k > num_experts:
        raise RouteError(f"routes of {first.top_k} experts per token cannot be encoded: there are {num_experts}")
    for place, sample in enumerate(samples):
        ids_MRK = sample.ids_MRK
        if (ids_MRK.dtype, sample.num_layers, sample.top_k) != wanted:
            raise RouteError(
                f"sample {place} has routes {ids_MRK.dtype} {list(ids_MRK.shape)} [MoE layers, rows, top_k], but its "
                f"group and {num_experts} experts need {wanted[0]} [{wanted[1]}, rows, {wanted[2]}]"
            )
        if sample.num_rows >= 1 << 32:
            raise RouteError(f"sample {place} has {sample.num_rows} rows: more than the format counts")
        if (largest := int(ids_MRK.max(initial=0))) >= num_experts:
            raise RouteError(f"sample {place} names expert {largest}, but there are {num_experts}")


def _shared_rows(samples: Sequence[RoutedExperts]) -> int:
    """Number of leading rows equal in all samples."""
    first, *others = samples
    if not others:
        return 0
    rows = min(sample.num_rows for sample in samples)
    for other in others:
        # one layer finds the first difference; the others are compared up to it
        for layers in (slice(0, 1), slice(1, None)):
            rows = _equal_rows(first.ids_MRK[layers, :rows], other.ids_MRK[layers, :rows])
    known_nR = np.stack([np.ones(rows, np.bool_) if s.known_R is None else s.known_R[:rows] for s in samples])
    return _equal_rows(known_nR[:1, :, None], known_nR[:, :, None])


def _equal_rows(a_MRK: npt.NDArray[np.generic], b_MRK: npt.NDArray[np.generic]) -> int:
    """Number of leading rows on axis R equal in both."""
    differs_MRK = a_MRK != b_MRK
    if not differs_MRK.any():
        return int(a_MRK.shape[1])
    return int(differs_MRK.any(axis=(0, 2)).argmax())


def _stored_known(samples: Sequence[RoutedExperts], shared: int) -> npt.NDArray[np.bool_]:
    """Mask of known rows among the stored ones. [T]"""
    masks = [np.ones(s.num_rows, np.bool_) if s.known_R is None else s.known_R for s in samples]
    return np.concatenate([masks[0][:shared], *(mask[shared:] for mask in masks)])


def _head_sum(head: memoryview) -> int:
    """CRC-32 of everything before the ids, except the checksum itself."""
    return zlib.crc32(head[SUM_AT + 4 :], zlib.crc32(head[:SUM_AT]))
