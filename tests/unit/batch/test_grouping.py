"""Micro-batches by token budget, against a simple checker and, for few samples, against every possible cut."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from roll_r3.batch.grouping import by_token_budget
from roll_r3.batch.token_map import Layout, build_token_map

alignments = st.sampled_from([1, 2, 8, 12])


@st.composite
def cases(draw, largest: int = 60) -> tuple[list[int], int, int]:
    """Draw (lengths, sufficient budget for every sample, alignment)."""
    lens = draw(st.lists(st.integers(1, 40), min_size=1, max_size=largest))
    alignment = draw(alignments)
    widest = max(rounded(n, alignment) for n in lens)
    return lens, widest + draw(st.integers(0, 200)), alignment


def rounded(length: int, alignment: int) -> int:
    while length % alignment:
        length += 1
    return length


def tokens_of(group, lens: list[int], alignment: int, packed: bool) -> int:
    """Return a micro-batch's tokens, as laid out by the token map."""
    layout = Layout(packed=packed, multiple=alignment)
    return build_token_map([lens[i] for i in group], layout).slots_BS.size


def cuts(samples: list[int]) -> Iterator[list[list[int]]]:
    """Return every way to cut samples into groups."""
    if not samples:
        yield []
        return
    for rest in cuts(samples[1:]):
        for i in range(len(rest)):
            yield [*rest[:i], [samples[0], *rest[i]], *rest[i + 1 :]]
        yield [[samples[0]], *rest]


@settings(max_examples=2000, deadline=None)
@given(cases(), st.booleans(), st.integers(1, 70))
def test_every_sample_once_within_the_budget_in_as_many_groups_as_asked(case, packed, at_least):
    lens, budget, alignment = case
    lengths_n = np.array(lens)
    needed = len(by_token_budget(lengths_n, budget, alignment, packed=packed))
    groups = by_token_budget(lengths_n, budget, alignment, packed=packed, at_least=at_least)
    assert len(groups) == min(max(at_least, needed), len(lens))
    assert sorted(i for group in groups for i in group.tolist()) == list(range(len(lens)))
    assert all(len(group) and (np.diff(group) > 0).all() for group in groups)
    sizes = [tokens_of(group, lens, alignment, packed) for group in groups]
    assert max(sizes) <= budget
    assert sizes == sorted(sizes, reverse=True)


@settings(max_examples=1500, deadline=None)
@given(cases())
def test_packed_groups_are_few_and_even(case):
    lens, budget, alignment = case
    tokens = [rounded(n, alignment) for n in lens]
    groups = by_token_budget(np.array(lens), budget, alignment, packed=True)
    lower = max(-(-sum(tokens) // budget), sum(2 * t > budget for t in tokens))
    assert len(groups) <= 2 * lower
    sums = [sum(tokens[i] for i in group) for group in groups]
    for group, total in zip(groups, sums, strict=True):
        assert total - min(tokens[i] for i in group) <= min(sums), "no group could give a sample away and be fuller"


@settings(max_examples=150, deadline=None)
@given(cases(largest=6), st.integers(1, 3))
def test_no_cut_into_padded_groups_is_smaller_or_has_fewer(case, at_least):
    lens, budget, alignment = case
    groups = by_token_budget(np.array(lens), budget, alignment, packed=False, at_least=at_least)

    def largest(cut) -> int:
        return max(len(group) * max(rounded(lens[i], alignment) for i in group) for group in cut)

    every = list(cuts(list(range(len(lens)))))
    fitting = [cut for cut in every if largest(cut) <= budget]
    assert len(groups) == min(max(at_least, min(map(len, fitting))), len(lens))
    assert largest(groups) == min(largest(cut) for cut in fitting if len(cut) == len(groups))


@settings(max_examples=300, deadline=None)
@given(cases(), st.booleans(), st.randoms())
def test_the_lengths_alone_decide(case, packed, random):
    lens, budget, alignment = case
    order = list(range(len(lens)))
    random.shuffle(order)

    def lengths_of(some: list[int]) -> list[list[int]]:
        groups = by_token_budget(np.array(some), budget, alignment, packed=packed)
        return sorted(sorted(rounded(some[i], alignment) for i in group) for group in groups)

    assert lengths_of([lens[i] for i in order]) == lengths_of(lens)


def test_even_groups_rather_than_full_ones():
    groups = by_token_budget(np.array([10] * 12), 100, 1, packed=True)
    assert [len(group) for group in groups] == [6, 6]
    groups = by_token_budget(np.array([10] * 12), 100, 1, packed=False)
    assert [len(group) for group in groups] == [6, 6]


def test_padded_groups_keep_like_lengths_together():
    groups = by_token_budget(np.array([2, 90, 3, 80, 1]), 180, 1, packed=False)
    assert [group.tolist() for group in groups] == [[1, 3], [0, 2, 4]]


@pytest.mark.parametrize("packed", [False, True])
def test_a_sample_over_the_budget_is_named(packed):
    with pytest.raises(ValueError, match=r"sample 1 has 9 inputs and takes 16 tokens .* more than the 15"):
        by_token_budget(np.array([3, 9, 2]), 15, 8, packed=packed)
    assert by_token_budget(np.array([], np.int64), 15, 8, packed=packed) == []
