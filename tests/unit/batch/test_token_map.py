"""Token map against a slow, simple simulation of Megatron's operations on tensors."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from roll_r3.batch.token_map import PADDING, Layout, build_token_map, gather_slots

lengths = st.lists(st.integers(1, 23), min_size=1, max_size=5)
sizes = st.sampled_from([1, 2, 4])


def brute_force(lens: list[int], packed: bool, cp: int, sp: int, pad_to: int = 0, multiple: int = 1):
    """Lay (sample, position) pairs out token by token, cut the zig-zag piece by piece, chunk over SP by slicing.

    Returns per cp rank: rows of cells [B][S]; and per (cp rank, sp rank): the cells seen by a router.
    """
    align = sp * (2 * cp if cp > 1 else 1) * multiple

    def up(n: int) -> int:
        while n % align:
            n += 1
        return n

    if packed:
        sequences = [[(i, p) if p < n else None for p in range(up(n))] for i, n in enumerate(lens)]
        total = sum(map(len, sequences))
        if up(pad_to) > total:
            sequences.append([None] * (up(pad_to) - total))
        rows = [sequences]
    else:
        width = up(max([*lens, pad_to]))
        rows = [[[(i, p) if p < n else None for p in range(width)]] for i, n in enumerate(lens)]
    grids, routers = {}, {}
    for c in range(cp):
        grid = []
        for row in rows:
            cells = []
            for sequence in row:
                if cp == 1:
                    cells += sequence
                else:
                    piece = len(sequence) // (2 * cp)
                    pieces = [sequence[k * piece : (k + 1) * piece] for k in range(2 * cp)]
                    cells += pieces[c] + pieces[2 * cp - 1 - c]
            grid.append(cells)
        grids[c] = grid
        # Megatron's hidden states are [sequence, batch, hidden]: flatten sequence outer, batch inner
        flat = [grid[b][s] for s in range(len(grid[0])) for b in range(len(grid))]
        chunk = len(flat) // sp
        for t in range(sp):
            routers[c, t] = flat[t * chunk : (t + 1) * chunk]
    return grids, routers


def cells_of(slots: np.ndarray, lens: list[int]) -> list:
    names = [(i, p) for i, n in enumerate(lens) for p in range(n)]
    return [None if s == PADDING else names[s] for s in slots]


@given(lengths, st.booleans(), st.sampled_from([0, 7, 40]), st.integers(1, 3))
def test_routers_that_see_row_after_row(lens, packed, pad_to, multiple):
    grids, _ = brute_force(lens, packed, 1, 1, pad_to, multiple)
    token_map = build_token_map(lens, Layout(packed, multiple=multiple, batch_outer=True), pad_to=pad_to)
    assert cells_of(token_map.router_slots_t, lens) == [cell for row in grids[0] for cell in row]


@settings(max_examples=1500, deadline=None)
@given(lengths, st.booleans(), sizes, sizes, st.sampled_from([0, 0, 7, 40]), st.integers(1, 3))
def test_every_layout_equals_the_simulation(lens, packed, cp, sp, pad_to, multiple):
    grids, routers = brute_force(lens, packed, cp, sp, pad_to, multiple)
    seen = []
    for c in range(cp):
        for t in range(sp):
            token_map = build_token_map(lens, Layout(packed, cp, c, sp, t, multiple), pad_to=pad_to)
            assert [cells_of(row, lens) for row in token_map.slots_BS] == grids[c]
            assert cells_of(token_map.router_slots_t, lens) == routers[c, t]
            assert len(token_map.router_slots_t) % multiple == 0
            held = token_map.slots_BS != PADDING
            expected = [p for row in grids[c] for cell in row if cell is not None for p in [cell[1]]]
            assert token_map.positions_BS[held].tolist() == expected
            seen += [cell for cell in cells_of(token_map.router_slots_t, lens) if cell is not None]
    assert sorted(seen) == [(i, p) for i, n in enumerate(lens) for p in range(n)], (
        "each input on exactly one router rank"
    )


@settings(max_examples=300, deadline=None)
@given(lengths, st.booleans(), sizes, sizes)
def test_what_is_gathered_comes_back_in_sample_order(lens, packed, cp, sp):
    values_N = np.arange(1, sum(lens) + 1, dtype=np.float32)
    total = np.zeros_like(values_N)
    for c in range(cp):
        token_map = build_token_map(lens, Layout(packed, cp, c, sp, 0))
        local = token_map.gather(values_N, fill=-7.0)
        assert (local[token_map.slots_BS == PADDING] == -7.0).all()
        total += token_map.scatter(local)
    np.testing.assert_array_equal(total, values_N)


@settings(max_examples=200, deadline=None)
@given(lengths, sizes, sizes, st.integers(1, 3))
def test_packed_boundaries_are_aligned_and_cover_the_row(lens, cp, sp, multiple):
    layout = Layout(True, cp, 0, sp, 0, multiple)
    token_map = build_token_map(lens, layout)
    assert token_map.cu_seqlens is not None
    assert token_map.cu_seqlens[0] == 0
    assert (np.diff(token_map.cu_seqlens) % layout.alignment == 0).all()
    assert (np.diff(token_map.cu_seqlens) // (cp * sp) % multiple == 0).all(), "each rank's share of each sample"
    assert token_map.cu_seqlens[-1] == token_map.slots_BS.size * cp


def test_routes_follow_tokens_when_ids_encode_sample_and_position():
    lens = [5, 3, 6]
    code_N = np.concatenate([100 * i + np.arange(n) for i, n in enumerate(lens)])
    for packed in (False, True):
        for c in range(2):
            token_map = build_token_map(lens, Layout(packed, 2, c, 2, 1))
            tokens = token_map.gather(code_N, fill=-1)
            routes = gather_slots(code_N[:, None], token_map.router_slots_t, fill=-1)[:, 0]
            np.testing.assert_array_equal(routes, tokens.T.reshape(2, -1)[1])


@pytest.mark.parametrize("lens", [[], [3, 0]])
def test_empty_samples_are_refused(lens):
    with pytest.raises(ValueError, match="at least one input"):
        build_token_map(lens, Layout())


def test_a_rank_outside_its_group_is_refused():
    with pytest.raises(ValueError, match="cp_rank must be in"):
        Layout(cp_size=2, cp_rank=2)


def test_a_multiple_below_one_is_refused():
    with pytest.raises(ValueError, match="multiple must be 1 or more"):
        Layout(multiple=0)
