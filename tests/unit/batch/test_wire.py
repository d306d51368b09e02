"""Wire form of routes: an exact round trip, shared rows stored once, and every broken form rejected."""

from __future__ import annotations

import struct
import tracemalloc
import zlib

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from roll_r3.batch import wire
from roll_r3.batch.routes import RoutedExperts, route_dtype
from roll_r3.errors import RouteError

EXPERTS = 8


def group(
    own_rows: list[int],
    *,
    shared: int = 0,
    layers: int = 3,
    top_k: int = 2,
    experts: int = EXPERTS,
    unknown: float = 0.0,
    seed: int = 0,
) -> list[RoutedExperts]:
    """Return samples with equal first rows and a different next row."""
    rng = np.random.default_rng(seed)
    dtype = route_dtype(experts)
    prompt = rng.integers(0, experts, (layers, shared, top_k)).astype(dtype)
    prompt_known = rng.random(shared) >= unknown
    samples = []
    for place, rows in enumerate(own_rows):
        own = rng.integers(0, experts, (layers, rows, top_k)).astype(dtype)
        own[:1, :1] = place % experts
        known = np.concatenate([prompt_known, rng.random(rows) >= unknown])
        samples.append(RoutedExperts(np.concatenate([prompt, own], axis=1), None if known.all() else known))
    return samples


def assert_same(got: tuple[RoutedExperts, ...], wanted: list[RoutedExperts]) -> None:
    for a, b in zip(got, wanted, strict=True):
        assert a.ids_MRK.dtype == b.ids_MRK.dtype
        assert np.array_equal(a.ids_MRK, b.ids_MRK)
        assert (a.known_R is None) == (b.known_R is None)
        assert a.known_R is None or np.array_equal(a.known_R, b.known_R)


groups = st.builds(
    group,
    st.lists(st.integers(0, 9), min_size=1, max_size=4),
    shared=st.integers(0, 9),
    layers=st.integers(1, 4),
    top_k=st.integers(1, 4),
    experts=st.sampled_from([4, 200, 256, 257, 65536]),
    unknown=st.sampled_from([0.0, 0.3, 1.0]),
    seed=st.integers(0, 99),
)


# Round trip


@given(samples=groups, experts=st.just(65536))
@settings(max_examples=300)
def test_what_goes_in_comes_out(samples: list[RoutedExperts], experts: int) -> None:
    if samples[0].ids_MRK.dtype == np.uint8:
        experts = 256
    assert_same(wire.decode(wire.encode(samples, experts)), samples)


@pytest.mark.parametrize("kind", [bytes, bytearray, memoryview, np.array])
@pytest.mark.parametrize("offset", [0, 1])
def test_any_buffer_at_any_address_will_do(kind: type, offset: int) -> None:
    samples = group([3, 4], shared=2, experts=300)
    encoded = wire.encode(samples, 300)
    moved = np.concatenate([np.zeros(offset, np.uint8), encoded])
    assert_same(wire.decode(kind(moved)[offset:]), samples)


def test_a_mask_that_knows_every_row_is_none() -> None:
    routes = group([3])[0]
    (decoded,) = wire.decode(wire.encode([RoutedExperts(routes.ids_MRK, np.ones(3, np.bool_))], EXPERTS))
    assert decoded.known_R is None


def test_the_bytes_are_those_of_the_description() -> None:
    """Compare with docs/wire_format.md, byte for byte, and its example; a change here needs a new version."""
    ids = np.arange(10, dtype=np.uint8)
    first = RoutedExperts(np.array([[[0], [1], [2]], [[3], [4], [5]]], np.uint8), np.array([True, True, False]))
    second = RoutedExperts(np.array([[[0], [6]], [[3], [7]]], np.uint8))
    body = bytes([0, 1, 2, 6, 3, 4, 5, 7])
    sums = [zlib.crc32(bytes(x)) for x in ([0], [1, 2], [6], [3], [4, 5], [7])]
    front = b"R3ROUTES" + struct.pack("<HHHHH2xIQ", 1, 1, 2, 1, 2, len(ids), 136)
    back = struct.pack("<4x3I6IB", 1, 2, 1, *sums, 0b1011)
    back += bytes(128 - len(front) - 4 - len(back))
    head = front + struct.pack("<I", zlib.crc32(front + back)) + back
    assert wire.encode([first, second], len(ids)).tobytes() == head + body


# Size


def test_shared_rows_are_stored_once() -> None:
    own = [40, 60, 50, 70, 30, 80, 20, 90]
    samples = group(own, shared=100, layers=48, top_k=8, experts=128)
    encoded = wire.encode(samples, 128)
    opened = wire.EncodedGroup(encoded)
    assert opened.stored_rows[0] == 100
    assert [opened.num_rows(i) for i in range(len(own))] == [100 + rows for rows in own]
    assert len(encoded) <= 1.02 * 48 * 8 * (100 + sum(own))


@pytest.mark.parametrize("layer", [0, 1, 2])
@pytest.mark.parametrize("sample", [0, 1, 2])
def test_rows_that_differ_anywhere_are_not_shared(sample: int, layer: int) -> None:
    samples = group([4, 4, 4], shared=20)
    samples[sample].ids_MRK[layer, 7, 1] ^= 1
    encoded = wire.encode(samples, EXPERTS)
    assert wire.EncodedGroup(encoded).stored_rows[0] == 7
    assert_same(wire.decode(encoded), samples)


def test_a_row_that_only_some_know_is_not_shared() -> None:
    samples = group([4, 4], shared=20)
    known = np.ones(24, np.bool_)
    known[5] = False
    samples[1] = RoutedExperts(samples[1].ids_MRK, known)
    encoded = wire.encode(samples, EXPERTS)
    assert wire.EncodedGroup(encoded).stored_rows[0] == 5
    assert_same(wire.decode(encoded), samples)


# Views


def test_a_view_is_the_asked_layers_and_samples_without_a_copy() -> None:
    samples = group([3, 4, 5], shared=6, layers=5, unknown=0.3)
    encoded = wire.encode(samples, EXPERTS)
    opened = wire.EncodedGroup(encoded)
    for layers in (range(0, 5), range(1, 3), range(4, 5), range(2, 2)):
        views = opened.view(layers, [2, 0])
        for view, sample in zip(views, [samples[2], samples[0]], strict=True):
            together = np.concatenate([view.shared_LPK, view.own_LQK], axis=1)
            assert np.array_equal(together, sample.ids_MRK[layers.start : layers.stop])
            assert np.array_equal(np.concatenate([view.shared_known_P, view.own_known_Q]), sample.known_R)
            for ids in (view.shared_LPK, view.own_LQK):
                assert np.shares_memory(ids, encoded) or not ids.size
                assert not ids.flags.writeable


def test_a_view_of_many_samples_takes_little_memory() -> None:
    """Hold the mask of the shared rows once, for any number of samples."""
    samples = [RoutedExperts(np.zeros((1, 20_000, 1), np.uint8), np.arange(20_000) != 5)] * 2_000
    opened = wire.EncodedGroup(wire.encode(samples, EXPERTS))
    tracemalloc.start()
    try:
        views = opened.view(range(1), range(2_000))
        assert tracemalloc.get_traced_memory()[1] < 4 << 20, "1 KB a view or so; the masks would be 40 MB"
    finally:
        tracemalloc.stop()
    assert not views[7].shared_known_P[5]


def test_more_experts_for_a_token_than_there_are_cannot_be_encoded() -> None:
    with pytest.raises(RouteError, match="3 experts per token cannot be encoded: there are 2"):
        wire.encode([RoutedExperts(np.zeros((1, 4, 3), np.uint8))], 2)


def test_bytes_that_are_not_one_run_of_memory_are_refused() -> None:
    with pytest.raises(RouteError, match="not encoded routes"):
        wire.EncodedGroup(np.frombuffer(wire.encode(group([2]), EXPERTS), np.uint8)[::2])


def test_the_layers_of_a_stage_are_one_block() -> None:
    samples = group([3, 4], shared=6, layers=6)
    encoded = wire.encode(samples, EXPERTS)
    stage = b"".join(np.concatenate([samples[0].ids_MRK[m], samples[1].ids_MRK[m, 6:]]).tobytes() for m in range(2, 5))
    assert stage in encoded.tobytes()


def test_a_view_checks_what_it_shows_and_nothing_else() -> None:
    samples = group([3, 4], shared=6, layers=3)
    encoded = wire.encode(samples, EXPERTS)
    opened = wire.EncodedGroup(encoded)
    ids_MTK = encoded[-3 * 13 * 2 :].reshape(3, 13, 2)
    ids_MTK[1, 7, 0] ^= 1  # layer 1, the first sample's second own row
    with pytest.raises(RouteError, match="the checksum of sample 0 in MoE layer 1 is wrong"):
        opened.view(range(0, 3), [0])
    assert len(opened.view(range(0, 3), [1])) == 1
    assert len(opened.view(range(0, 1), [0, 1])) == 2
    ids_MTK[1, 7, 0] ^= 1
    ids_MTK[2, 0, 0] ^= 1  # layer 2, shared
    with pytest.raises(RouteError, match="the checksum of the shared rows in MoE layer 2 is wrong"):
        opened.view(range(1, 3), [1])


@pytest.mark.parametrize(
    ("layers", "samples"),
    [
        (range(0, 4), [0]),
        (range(-1, 2), [0]),
        (range(0, 3, 2), [0]),
        (range(2, 1), [0]),
        (range(3), [2]),
        (range(3), [-1]),
    ],
)
def test_a_view_of_what_is_not_there(layers: range, samples: list[int]) -> None:
    with pytest.raises(IndexError):
        wire.EncodedGroup(wire.encode(group([1, 1]), EXPERTS)).view(layers, samples)


def test_no_samples_are_no_views() -> None:
    assert wire.EncodedGroup(wire.encode(group([1, 1]), EXPERTS)).view(range(3), []) == ()


# Values that cannot be encoded


def other(**changes: int) -> list[RoutedExperts]:
    return [*group([2]), *group([2], **{"seed": 1, **changes})]


@pytest.mark.parametrize(
    ("samples", "experts", "said"),
    [
        ([], EXPERTS, "no routes to encode"),
        (other(layers=2), EXPERTS, r"sample 1 has routes uint8 \[2, 2, 2\]"),
        (other(top_k=3), EXPERTS, r"sample 1 has routes uint8 \[3, 2, 3\]"),
        (other(experts=300), EXPERTS, "sample 1 has routes uint16"),
        (group([2]), 300, "sample 0 has routes uint8 .* need uint16"),
        (group([2], layers=0), EXPERTS, "0 MoE layers"),
        (group([2], top_k=0), EXPERTS, "0 experts per token"),
        (group([0] * 65536), EXPERTS, "65536 samples"),
        ([RoutedExperts(np.full((1, 1, 1), 8, np.uint8))], EXPERTS, "sample 0 names expert 8, but there are 8"),
        (group([2]), 0, r"num_experts must be in \[1, 65536\]"),
    ],
)
def test_what_cannot_be_encoded(samples: list[RoutedExperts], experts: int, said: str) -> None:
    with pytest.raises(RouteError, match=said):
        wire.encode(samples, experts)


# Broken encodings


def broken(data: bytes | bytearray, said: str | None = None) -> None:
    with pytest.raises(RouteError, match=said):
        wire.decode(data)


@pytest.mark.parametrize("unknown", [0.0, 0.5])
def test_cut_short_at_any_byte_or_too_long(unknown: float) -> None:
    data = wire.encode(group([2, 3], shared=4, unknown=unknown), EXPERTS).tobytes()
    for length in range(len(data)):
        broken(data[:length])
    broken(data + b"\0", "bytes long")


@pytest.mark.parametrize("experts", [EXPERTS, 300])
def test_any_flipped_bit_is_noticed(experts: int) -> None:
    data = bytearray(wire.encode(group([2, 3], shared=4, experts=experts, unknown=0.5), experts))
    for bit in range(8 * len(data)):
        data[bit // 8] ^= 1 << bit % 8
        broken(data)
        data[bit // 8] ^= 1 << bit % 8
    wire.decode(data)


@given(samples=groups, data=st.data())
@settings(max_examples=300)
def test_damage_anywhere_is_noticed(samples: list[RoutedExperts], data: st.DataObject) -> None:
    experts = 256 if samples[0].ids_MRK.dtype == np.uint8 else 65536
    encoded = wire.encode(samples, experts)
    start = data.draw(st.integers(0, len(encoded) - 1))
    damage = data.draw(st.binary(min_size=1, max_size=8))
    end = min(start + len(damage), len(encoded))
    changed = encoded.tobytes()[:start] + damage[: end - start] + encoded.tobytes()[end:]
    if changed != encoded.tobytes():
        broken(changed)


def sealed(fixed: tuple[int, ...], rest: bytes, body: bytes = b"") -> bytes:
    """Return a head of arbitrary numbers with its right checksum."""
    version, flags, layers, top_k, samples, experts, length = fixed
    front = wire.MAGIC + struct.pack("<HHHHH2xIQ", version, flags, layers, top_k, samples, experts, length)
    back = bytes(4) + rest
    back += bytes(-(len(front) + 4 + len(back)) % wire.ALIGNMENT)
    return front + struct.pack("<I", zlib.crc32(front + back)) + back + body


small = st.integers(0, 3)
hostile = st.tuples(
    st.sampled_from([1, 1, 1, 0, 2]),
    st.sampled_from([0, 1, 1, 2, 0xFFFF]),
    small | st.just(0xFFFF),
    small | st.just(0xFFFF),
    small | st.just(0xFFFF),
    small | st.sampled_from([256, 257, 65536, 65537, 0xFFFFFFFF]),
    st.integers(0, 400) | st.just((1 << 64) - 1),
)


@given(fixed=hostile, rest=st.binary(max_size=200), body=st.binary(max_size=200), honest_length=st.booleans())
@example(fixed=(1, 0, 1, 1, 1, 1, 0), rest=struct.pack("<2I", 0xFFFFFFFF, 0xFFFFFFFF), body=b"", honest_length=True)
@example(fixed=(1, 1, 1, 1, 1, 1, 0), rest=struct.pack("<2I", 0xFFFFFFFF, 0xFFFFFFFF), body=b"", honest_length=True)
@settings(max_examples=1000)
def test_a_hostile_head_is_an_error_and_allocates_nothing_large(
    fixed: tuple[int, ...], rest: bytes, body: bytes, honest_length: bool
) -> None:
    data = sealed(fixed, rest, body)
    if honest_length:
        data = sealed((*fixed[:-1], len(data)), rest, body)
    tracemalloc.start()
    try:
        wire.decode(data)
    except RouteError:
        pass
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert peak < 1 << 20


def test_a_hostile_head_says_what_is_wrong() -> None:
    one = struct.pack("<2I", 0, 1) + struct.pack("<2I", 0, zlib.crc32(b"\0"))
    good = (1, 0, 1, 1, 1, 2, 65)
    assert wire.decode(sealed(good, one, b"\0"))[0].ids_MRK.tolist() == [[[0]]]
    broken(b"", "truncated: 0 bytes")
    broken(b"x" + sealed(good, one, b"\0")[1:], "do not begin with R3ROUTES")
    broken(sealed((2, *good[1:]), one, b"\0"), "of version 2: this program reads version 1")
    broken(sealed((1, 2, *good[2:]), one, b"\0"), "flags unknown to version 1: 0x2")
    for place in (2, 3, 4):
        broken(sealed((*good[:place], 0, *good[place + 1 :]), one, b"\0"), "are invalid")
    broken(sealed((1, 0, 1, 3, 1, 2, 65), one, b"\0"), "3 of 2 experts each")
    broken(sealed((1, 0, 1, 1, 1, 65537, 65), one, b"\0"), "num_experts must be in")
    broken(sealed((1, 0, 0xFFFF, 1, 0xFFFF, 2, 65), one, b"\0"), "their tables end at")
    broken(sealed((*good[:-1], 66), one, b"\0"), "are 65 bytes long, but their head states 66")
    two = struct.pack("<2I", 0, 1) + struct.pack("<2I", 0, zlib.crc32(b"\2"))
    broken(sealed(good, two, b"\2"), "name expert 2 in sample 0, but there are 2")


@pytest.mark.parametrize(("place", "value"), [(18, 1), (19, 1), (36, 1), (39, 1), (56, 0b10), (57, 1), (63, 1)])
def test_what_is_to_be_zero_is(place: int, value: int) -> None:
    """Check reserved bytes, bits of the mask beyond the last row, and the gap before the ids."""
    rest = struct.pack("<2I", 0, 1) + struct.pack("<2I", 0, zlib.crc32(b"\0"))
    data = bytearray(sealed((1, 1, 1, 1, 1, 2, 65), rest, b"\0"))
    assert wire.decode(data)[0].known_R.tolist() == [False]
    data[place] |= value
    data[32:36] = struct.pack("<I", zlib.crc32(data[36:64], zlib.crc32(data[:32])))
    broken(data, "reserved bytes are not zero")


def test_shared_rows_do_not_blow_up_what_is_decoded() -> None:
    samples = group([0] * 500, shared=1000, layers=1, top_k=1)
    encoded = wire.encode(samples, EXPERTS)
    assert len(encoded) < 6000
    with pytest.raises(RouteError, match="take 1000000 bytes when decoded, but at most 999999 are allowed"):
        wire.decode(encoded, max_bytes=999_999)
    assert len(wire.decode(encoded, max_bytes=1_000_000)) == 500
