"""Order in which prompts are drawn, and its continuation after earlier steps."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from itertools import count, islice
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from roll_r3.config.workers import DataArgs
from roll_r3.data.order import PromptOrder
from roll_r3.data.prompts import read_prompts
from roll_r3.errors import ConfigError
from roll_r3.models.tiny import byte_tokenizer


@pytest.fixture(scope="module")
def tokenizer():
    return byte_tokenizer()


def batches(
    prompts: Sequence[Any], size: int, seed: int, *, drawn: Sequence[tuple[int, int]] = ()
) -> Iterator[list[Any]]:
    """Yield the prompts of step after step."""
    order = PromptOrder(len(prompts), (seed,), tuple(drawn))
    return ([prompts[i] for i in order.draw(size, repeats=size > len(prompts))] for _ in count())


def test_batches_pass_over_the_data_in_seeded_orders(tokenizer):
    prompts = read_prompts(DataArgs(file_name="bundled:addition_mod10"), tokenizer, 10)
    first = list(islice(batches(prompts, 32, seed=1), 25))
    again = list(islice(batches(prompts, 32, seed=1), 25))
    assert first == again
    assert first[0] != next(batches(prompts, 32, seed=2))
    for batch in first:
        assert len({p.prompt_id for p in batch}) == 32, "no prompt twice in a batch, also where two passes meet"
    counts = [p.prompt_id for batch in first for p in batch]
    assert {counts.count(p.prompt_id) for p in prompts} == {8}, "25 x 32 = 8 x 100: every prompt as often"


@pytest.mark.parametrize("drawn", [[(7, 32)], [(2, 32), (5, 12), (1, 100)], [(1, 250)]])
def test_batches_continue_after_those_drawn(tokenizer, drawn):
    """Batch sizes before and after may differ."""
    prompts = read_prompts(DataArgs(file_name="bundled:addition_mod10"), tokenizer, 10)
    before = [size for batches, size in drawn for _ in range(batches)]
    steps = 9
    whole = []
    for later in (32, 5):
        found = list(islice(batches(prompts, later, seed=1, drawn=drawn), steps))
        again = list(islice(batches(prompts, later, seed=1, drawn=[(1, size) for size in before]), steps))
        assert found == again
        whole.append(found)
    if set(before) == {32}:
        assert whole[0] == list(islice(batches(prompts, 32, seed=1), len(before), len(before) + steps))
    assert whole[0] != list(islice(batches(prompts, 32, seed=1), steps))


def drawn_one_by_one(prompts: int, seed: int, sizes: Iterable[int]) -> Iterator[list[int]]:
    """Draw every batch, one prompt after the other: the definition of the order."""
    queue: deque[int] = deque()
    epoch = 0
    for size in sizes:
        batch: list[int] = []
        while len(batch) < size:
            if not queue:
                order = np.random.default_rng((seed, epoch)).permutation(prompts).tolist()
                epoch += 1
                taken = set(batch) if prompts >= size else set()
                queue.extend([i for i in order if i not in taken] + [i for i in order if i in taken])
            batch.append(queue.popleft())
        yield batch


@given(
    prompts=st.integers(1, 24),
    seed=st.integers(0, 3),
    drawn=st.lists(st.tuples(st.integers(1, 40), st.integers(1, 60)), max_size=5),
    size=st.integers(1, 60),
)
@settings(max_examples=400, deadline=None)
def test_skipping_equals_drawing_one_by_one(prompts, seed, drawn, size):
    """Skipped passes change nothing, also for batches larger than the data."""
    before = [earlier for batches, earlier in drawn for _ in range(batches)]
    sizes = [*before, *[size] * 6]
    wanted = list(drawn_one_by_one(prompts, seed, sizes))[len(before) :]
    assert list(islice(batches(range(prompts), size, seed, drawn=drawn), 6)) == wanted


@pytest.mark.timeout(20)
@pytest.mark.parametrize(
    "drawn",
    [[(4, 1 << 40)], [(1 << 40, 8)], [(3, 8), (1 << 40, 12)], [(1, 3), (1 << 40, 120), (7, 5)]],
    ids=["large batches", "many batches", "of another size before", "and after"],
)
def test_a_place_far_on_is_found_at_once(drawn):
    assert len(next(batches(range(100), 8, 1, drawn=drawn))) == 8


def test_a_place_behind_too_many_passes_is_rejected():
    """After an odd number of prompts no batch of 8 is aligned with a pass."""
    with pytest.raises(ConfigError, match=r"1099511627776 batches of 8 prompts of 100 cannot be found: \d+ passes"):
        batches(range(100), 8, 1, drawn=[(1, 3), (1 << 40, 8)])


def test_more_prompts_than_data_repeat(tokenizer):
    prompts = read_prompts(DataArgs(file_name="bundled:addition_mod10"), tokenizer, 10)[:3]
    assert len(next(batches(prompts, 8, seed=0))) == 8
