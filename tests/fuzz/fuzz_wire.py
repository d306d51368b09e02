"""Hostile bytes in the place of encoded routes, checked by a slow reading of docs/wire_format.md."""

from __future__ import annotations

import struct
import zlib
from typing import Any

import numpy as np
from fuzz_harness import NUMBERS, Verdict, Wrong, mutated
from hypothesis import strategies as st

from roll_r3.batch import wire
from roll_r3.batch.routes import RoutedExperts, route_dtype
from roll_r3.errors import RouteError

DECODED = 1 << 24
"""Limit of decoded arrays in bytes."""
Rows = list[list[list[int]]]
"""[M][R][K]"""


@st.composite
def _buffers(draw: st.DrawFn) -> bytes:
    experts = draw(st.sampled_from([4, 200, 256, 257, 65536]))
    layers, top_k, shared = draw(st.integers(1, 3)), draw(st.integers(1, 3)), draw(st.integers(0, 5))
    rng = np.random.default_rng(draw(st.integers(0, 1 << 20)))
    unknown = draw(st.sampled_from([0.0, 0.3]))
    prompt = rng.integers(0, experts, (layers, shared, top_k))
    samples = []
    for rows in draw(st.lists(st.integers(0, 6), min_size=1, max_size=3)):
        ids = np.concatenate([prompt, rng.integers(0, experts, (layers, rows, top_k))], axis=1)
        known = rng.random(shared + rows) >= unknown
        samples.append(RoutedExperts(ids.astype(route_dtype(experts)), None if known.all() else known))
    data = wire.encode(samples, experts).tobytes()
    kind = draw(st.sampled_from(["as it is", "mutated", "mutated", "sealed", "sealed", "made up"]))
    if kind == "mutated":
        return draw(mutated(data))
    if kind == "sealed":
        return sealed(draw(mutated(data, most=2)))
    if kind == "made up":
        counts = st.sampled_from([n for n in NUMBERS if 0 <= n < 1 << 16])
        fields = [draw(counts) for _ in range(6)]
        head = wire.MAGIC + struct.pack("<6HIQII", 1, fields[0] & 1, *fields[1:4], 0, fields[4], 0, 0, 0)
        return sealed(head + draw(st.binary(max_size=300)), honest_length=True)
    return data


def sealed(data: bytes, *, honest_length: bool = False) -> bytes:
    """Return the data with the right checksums, as an attacker would write them."""
    out = bytearray(data)
    if len(out) < 40:
        return data
    if honest_length:
        out[24:32] = struct.pack("<Q", len(out))
    layers, _, samples = struct.unpack_from("<3H", out, 12)
    (experts,) = struct.unpack_from("<I", out, 20)
    sums_at = 40 + 4 * (samples + 1)
    mask_at = sums_at + 4 * (samples + 1) * layers
    if mask_at > len(out):
        return bytes(out)
    rows = struct.unpack_from(f"<{samples + 1}I", out, 40)
    mask = -(-sum(rows) // 8) if out[10] & 1 else 0
    ids_at = -(-(mask_at + mask) // 64) * 64
    if ids_at > len(out):
        return bytes(out)
    width = struct.unpack_from("<H", out, 14)[0] * (1 if experts <= 256 else 2)
    at, sums = ids_at, []
    for _ in range(layers):
        for count in rows:
            sums.append(zlib.crc32(out[at : at + count * width]))
            at += count * width
    out[sums_at:mask_at] = struct.pack(f"<{len(sums)}I", *sums)
    out[32:36] = struct.pack("<I", zlib.crc32(out[36:ids_at], zlib.crc32(out[:32])))
    return bytes(out)


def read_slowly(data: bytes) -> list[tuple[Rows, list[bool]]] | None:
    """Return each sample's ids and known rows, read line by line as the format says; None if malformed."""
    if len(data) < 40 or data[:8] != b"R3ROUTES":
        return None
    number = lambda at, size: int.from_bytes(data[at : at + size], "little")  # noqa: E731
    version, flags, layers, top_k, samples, zero = (number(at, 2) for at in (8, 10, 12, 14, 16, 18))
    experts, length, head_sum, zeros = number(20, 4), number(24, 8), number(32, 4), number(36, 4)
    if version != 1 or flags > 1 or zero or zeros or not layers or not samples or length != len(data):
        return None
    if not 1 <= experts <= 65536 or not 1 <= top_k <= experts:
        return None
    at = 40 + 4 * (samples + 1)
    if at + 4 * layers * (samples + 1) > len(data):
        return None
    rows = [number(40 + 4 * i, 4) for i in range(samples + 1)]
    sums = [[number(at + 4 * (m * (samples + 1) + i), 4) for i in range(samples + 1)] for m in range(layers)]
    at += 4 * layers * (samples + 1)
    total = sum(rows)
    ids_at = at + (-(-total // 8) if flags else 0)
    ids_at += -ids_at % 64
    width = 1 if experts <= 256 else 2
    if ids_at + layers * total * top_k * width != len(data):
        return None
    if zlib.crc32(data[:32] + data[36:ids_at]) != head_sum:
        return None
    known = [not flags or bool(data[at + t // 8] >> t % 8 & 1) for t in range(total)]
    used = total if flags else 0
    if any(number(at, ids_at - at) >> bit & 1 for bit in range(used, 8 * (ids_at - at))):
        return None
    blocks: list[list[Rows]] = []
    at = ids_at
    for m in range(layers):
        blocks.append([])
        for i, count in enumerate(rows):
            block = data[at : at + count * top_k * width]
            if zlib.crc32(block) != sums[m][i]:
                return None
            ids = [number(at + width * j, width) for j in range(count * top_k)]
            if ids and max(ids) >= experts:
                return None
            blocks[-1].append([ids[j : j + top_k] for j in range(0, len(ids), top_k)])
            at += len(block)
    ends = [sum(rows[: i + 1]) for i in range(samples + 1)]
    return [
        ([blocks[m][0] + blocks[m][i] for m in range(layers)], known[: rows[0]] + known[ends[i - 1] : ends[i]])
        for i in range(1, samples + 1)
    ]


class Wire:
    name = "wire"

    def inputs(self) -> st.SearchStrategy[Any]:
        return _buffers()

    def judge(self, value: bytes) -> Verdict:
        right = read_slowly(value)
        try:
            found = wire.decode(value, max_bytes=DECODED)
        except RouteError as error:
            if right is not None and "are allowed" not in str(error):
                raise Wrong(f"refused, and is right: {error}") from error
            return "refused"
        if right is None:
            raise Wrong("taken, and is not what the format says")
        for routes, (ids, known) in zip(found, right, strict=True):
            same = routes.ids_MRK.tolist() == ids
            if not same or (routes.known_R.tolist() if routes.known_R is not None else [True] * len(known)) != known:
                raise Wrong("read as something else than it says")
        return "taken"

    def close(self) -> None: ...
