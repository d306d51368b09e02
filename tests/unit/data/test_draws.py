"""Prompts of each step, in one part or in sections, with prompts that come back."""

from __future__ import annotations

from itertools import accumulate

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from roll_r3.config.shares import section_sizes
from roll_r3.data.draws import Place, PromptSource, prompt_source, unused_sections
from roll_r3.data.order import PromptOrder
from roll_r3.data.prompts import Prompt
from roll_r3.errors import ConfigError

PROMPTS = [Prompt(f"p{i}", "", (i,), "", domain=domain) for i, domain in enumerate("aabab" * 4 + "ccc")]


def source(size: int, **shares: float) -> PromptSource:
    return prompt_source(PROMPTS, size, 5, shares=shares, section_of=str)


@pytest.mark.parametrize(
    ("shares", "size", "sizes"),
    [
        ({"a": 0.25, "b": 0.75}, 16, {"a": 4, "b": 12}),
        ({"a": 0.4, "b": 0.3, "c": 0.3}, 64, {"a": 25, "b": 19, "c": 20}),
        ({"a": 0.29, "b": 0.71}, 100, {"a": 28, "b": 72}),  # 0.29 * 100 is just below 29, for ROLL too
        ({"a": 0.1, "b": 0.9}, 4, {"a": 0, "b": 4}),
        ({"a": 1.0}, 7, {"a": 7}),
    ],
)
def test_sections_divide_a_step_as_in_roll(shares: dict[str, float], size: int, sizes: dict[str, int]) -> None:
    assert section_sizes(shares, size) == sizes


def test_a_section_draws_its_own_prompts_alone_and_all_of_them_in_a_pass() -> None:
    parts = {part.name: part for part in source(8, a=0.5, b=0.5).parts}
    for name, part in parts.items():
        drawn = []
        for _ in range(part.num_prompts):
            part.begin()
            drawn += part.draw(4)
            part.end([])
        assert {PROMPTS[number].domain for number in drawn} == {name}
        assert {drawn.count(number) for number in drawn} == {4}


def test_sections_without_prompts_and_prompts_without_a_share() -> None:
    with pytest.raises(ConfigError, match="no prompt belongs to x, y"):
        source(4, a=0.5, x=0.25, y=0.25)
    assert unused_sections(PROMPTS, {"a": 1.0}, str) == {"b": 8, "c": 3}
    assert unused_sections(PROMPTS, {}, str) == {}


def test_returned_prompts_come_first_in_their_order() -> None:
    (part,) = source(4).parts
    part.begin()
    first = part.draw(6)
    part.end([first[5], first[1]])
    assert part.returned == (first[5], first[1])
    part.begin()
    assert part.draw(1) == [first[5]]
    assert part.draw(2)[0] == first[1]
    part.end([first[1]])
    assert (part.returned, part.drawn) == ((first[1],), ((1, 6), (1, 1)))


def test_a_step_with_returned_prompts_alone_draws_nothing_new() -> None:
    (part,) = source(2).parts
    part.begin()
    drawn = part.draw(8)
    part.end(drawn[2:])
    part.begin()
    assert part.draw(2) == drawn[2:4]
    part.end([])
    assert part.drawn == ((1, 8),)


def test_a_step_larger_than_the_data_repeats_all_and_returns_none() -> None:
    (part,) = source(2 * len(PROMPTS)).parts
    part.begin()
    drawn = part.draw(2 * len(PROMPTS))
    assert {drawn.count(number) for number in drawn} == {2}
    assert part.left is None
    part.end(drawn[:3])
    assert part.returned == ()


@given(
    prompts=st.integers(1, 24),
    steps=st.lists(st.lists(st.integers(1, 5), min_size=1, max_size=5), min_size=1, max_size=12),
    later=st.integers(1, 24),
)
@settings(max_examples=200, deadline=None)
def test_a_step_drawn_in_pieces_continues_as_one_drawn_at_once(
    prompts: int, steps: list[list[int]], later: int
) -> None:
    """No step draws more than there are, and none draws a prompt twice."""
    order, sizes = PromptOrder(prompts, (1,)), []
    for pieces in steps:
        kept = [piece for piece, total in zip(pieces, accumulate(pieces), strict=True) if total <= prompts]
        drawn: list[int] = []
        for piece in kept:
            drawn += order.draw(piece, len(drawn))
        assert len(set(drawn)) == len(drawn)
        sizes += [len(drawn)] if drawn else []
    resumed = PromptOrder(prompts, (1,), tuple((1, size) for size in sizes))
    count = min(later, prompts)
    assert [resumed.draw(count) for _ in range(4)] == [order.draw(count) for _ in range(4)]


def test_places_of_sections_that_a_run_does_not_use_are_kept() -> None:
    before = source(8, a=0.5, b=0.5)
    for part in before.parts:
        part.begin()
        part.end(part.draw(5)[:1])
    place = before.place
    after = prompt_source(PROMPTS, 4, 5, shares={"a": 1.0}, section_of=str, place=place)
    (part,) = after.parts
    part.begin()
    part.draw(4)
    part.end([])
    assert after.place.sections["b"] == place.sections["b"]
    assert after.place.returned == before.parts[1].returned
    assert after.place.sections["a"].drawn == ((1, 5), (1, 3))
    assert prompt_source(PROMPTS, 4, 5, shares={}, section_of=str, place=place).place.sections == place.sections
    assert Place().sections == {}
