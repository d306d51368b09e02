"""Final answer of a response."""

from __future__ import annotations

import pytest

from roll_r3.rewards.final_answer import final_answer


@pytest.mark.parametrize(
    ("response", "answer"),
    [
        (r"\boxed{1} no, \boxed{2}.", "2"),
        (r"so \boxed{\frac{1}{2}} it is", r"\frac{1}{2}"),
        (r"\boxed{ 3 x }", "3x"),
        (r"\boxed{4} and \boxed{5", "4"),  # the last one is cut off
        (r"\boxed{6", r"\boxed{6"),
        ("steps\n#### 42 \n\n", "####42"),
        ("7", "7"),
        ("", ""),
        (" \n ", ""),
    ],
)
def test_the_last_box_or_the_last_line_is_the_answer(response: str, answer: str) -> None:
    assert final_answer(response) == answer
