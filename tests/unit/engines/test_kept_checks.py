"""Sets of kept tokens on arrival: every way to break their contract is refused with a reason."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from roll_r3.engines.kept_checks import read_kept
from roll_r3.errors import RouteError

RESPONSE = np.array([9, 8, 258], np.int32)
SETS = [[9, 4], [8], [7, 258, 3]]


def test_good_sets_are_read() -> None:
    kept = read_kept(SETS, RESPONSE, 260)
    assert (kept.counts_S.tolist(), kept.ids_J.tolist()) == ([2, 1, 3], [9, 4, 8, 7, 258, 3])


@pytest.mark.parametrize(
    ("rows", "why"),
    [
        (None, "must be a list of lists of integers, got None"),
        ([[9], 8, [258]], "must be a list of lists of integers"),
        ([[9], [8.0], [258]], "must be a list of lists of integers"),
        ([[9], [True], [258]], "must be a list of lists of integers"),
        ([[9, 1 << 40], [8], [258]], "cannot be read"),
        (SETS[:2], "got 2 sets of kept tokens for 3 sampled tokens"),
        ([*SETS, [1]], "got 4 sets of kept tokens for 3 sampled tokens"),
        ([[9, 260], [8], [258]], r"ids in \[8, 260\], but the vocabulary has 260 tokens"),
        ([[9, -1], [8], [258]], r"ids in \[-1, 258\]"),
        ([[9], [], [258]], "sampled token 8 at place 1 of the response is not among its 0 kept tokens"),
        ([SETS[1], SETS[0], SETS[2]], r"sampled token 9 at place 0 .* 1 kept tokens \(2 such tokens\)"),
        ([[9, 4], [8], [7, 258, 7]], "token 7 is twice among the kept tokens at place 2"),
    ],
)
def test_a_broken_contract_is_named(rows: Any, why: str) -> None:
    with pytest.raises(RouteError, match=why):
        read_kept(rows, RESPONSE, 260)


def test_the_same_token_may_be_in_several_sets() -> None:
    assert read_kept([[9, 4], [8, 4], [4, 258]], RESPONSE, 260).num_rows == 3


ROW = st.lists(st.one_of(st.integers(-1, 4), st.sampled_from([1.0, True, None, "1"])), max_size=4)


@given(st.one_of(st.lists(ROW, max_size=3), ROW), st.lists(st.integers(0, 3), min_size=1, max_size=3))
def test_sets_are_read_exactly_where_their_contract_holds(rows: Any, response: list[int]) -> None:
    good = len(rows) == len(response) and all(
        isinstance(row, list)
        and all(type(token) is int and 0 <= token < 4 for token in row)
        and len(set(row)) == len(row)
        and sampled in row
        for row, sampled in zip(rows, response, strict=True)
    )
    try:
        kept = read_kept(rows, np.array(response, np.int32), 4)
    except RouteError:
        assert not good
    else:
        assert good and kept.ids_J.tolist() == [token for row in rows for token in row]
