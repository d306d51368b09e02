"""Each family with a few hundred hostile inputs, the same every time. `make fuzz` draws thousands."""

from __future__ import annotations

import logging
import time

import pytest
from families import FAMILIES
from fuzz_harness import Family, Wrong, tally
from hypothesis import strategies as st

INPUTS = 25
"""Inputs for each unit of a family's share."""


@pytest.mark.timeout(300)
@pytest.mark.parametrize("name", FAMILIES)
def test_what_is_hostile_is_refused_or_harmless(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logging.root.manager, "disable", logging.ERROR)
    family = FAMILIES[name].kind()
    try:
        found = tally(family, INPUTS * FAMILIES[name].share, 1)
    finally:
        family.close()
    print(found)
    assert not found.failures, "\n".join(found.failures)
    assert found.inputs >= INPUTS * FAMILIES[name].share // 2
    assert found.refused


class _Broken(Family):
    """Family of failures for the harness itself."""

    name = "broken"

    def inputs(self) -> st.SearchStrategy[str]:
        return st.sampled_from(["crash", "wrong", "hang", "sleep", "memory"])

    def judge(self, value: str) -> str:
        if value == "crash":
            return [].pop()
        if value == "wrong":
            raise Wrong("taken")
        while value == "hang":
            pass
        if value == "sleep":
            time.sleep(5)
        return str(bytearray(4 << 30)[:1])

    def close(self) -> None: ...


def test_the_harness_notices_a_crash_a_hang_a_wrong_answer_and_a_large_allocation(monkeypatch) -> None:
    monkeypatch.setattr("fuzz_harness.SECONDS", 0.2)
    monkeypatch.setattr("fuzz_harness.ASLEEP", 0.5)
    found = tally(_Broken(), 40, 1)
    assert found.taken == found.refused == 0
    assert {text.split(":")[0] for text in found.failures} == {"IndexError", "Wrong", "TooSlow", "MemoryError"}
