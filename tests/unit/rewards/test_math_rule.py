"""Rule `math`: correct answers in many notations, and texts on which math-verify never ends."""

from __future__ import annotations

import resource
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

import math_verify
import pytest
from slow_answers import SLOW

from roll_r3.rewards import math_rule
from roll_r3.rewards.math_rule import can_be_matched, math
from roll_r3.rewards.rules import Undecided

SECONDS = 0.15


@pytest.mark.parametrize("truth", [r"\$18", "$18", "$18$", "18", r"\$ 18", r"$\$18$"])
@pytest.mark.parametrize(
    "response",
    [
        r"\boxed{\$18}",
        r"\boxed{18}",
        "18",
        r"\$18",
        "it costs $18",
        r"At first \$5, so the total is \$18.",
        r"**\$18**",
        r"$\$18$",
        r"\[ \$18 \]",
        r"\boxed{\text{\$}18}",
    ],
)
def test_an_escaped_dollar_is_a_currency_and_no_delimiter(truth: str, response: str) -> None:
    assert math(response, truth) == 1
    assert math(response.replace("18", "19"), truth) == 0


def test_a_dollar_after_a_line_break_still_delimits() -> None:
    assert math_rule._without_currency("\\\\$x$ and \\$5 and \\\\\\$6") == "\\\\$x$ and 5 and \\\\6"


@pytest.mark.parametrize(
    ("response", "truth"),
    [
        (r"so \boxed{\frac{1}{2}}", "0.5"),
        (r"\boxed{(2, 3)}", "(2,3)"),
        (r"\boxed{\{3, 1, 2\}}", r"\{1,2,3\}"),
        (r"\boxed{x^2 + 2x + 1}", "(x+1)^2"),
        (r"\boxed{\begin{pmatrix} 1 \\ 2 \end{pmatrix}}", r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}"),
        (r"\boxed{Monday}", r"\text{Monday}"),
    ],
)
def test_an_answer_counts_in_every_notation(response: str, truth: str) -> None:
    assert (math(response, truth), math(r"\boxed{17}", truth)) == (1, 0)


@pytest.mark.parametrize("text", SLOW.values(), ids=SLOW)
def test_a_text_that_takes_long_is_given_up_in_time(text: str) -> None:
    math("7", "7")
    began = time.process_time()
    with suppress(Undecided):  # some are over in time, on a fast machine
        assert math(text, "7", seconds=SECONDS) == 0
    assert time.process_time() - began < SECONDS + 1.5, "one product of large integers in C may take a while"
    assert math(r"so \boxed{7}", "7") == 1


@pytest.mark.parametrize("name", ["tower", "ones", "set of 1000", "factorial", "binomial"])
def test_these_texts_take_long(name: str) -> None:
    with pytest.raises(Undecided, match=r"^took longer than 0\.1 s$"):
        math(SLOW[name], "7", seconds=0.1)


def test_memory_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(math_rule, "_MEMORY", 64 << 20)
    monkeypatch.setattr(math_rule, "parse", lambda text, **_: [bytearray(1 << 30)])
    before = resource.getrlimit(resource.RLIMIT_DATA)
    with pytest.raises(Undecided, match="raised MemoryError"):
        math("7", "a truth of its own")
    assert resource.getrlimit(resource.RLIMIT_DATA) == before
    assert len(bytearray(1 << 28)) == 1 << 28


def test_errors_of_math_verify_are_undecided(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: object, **__: object) -> None:
        raise ZeroDivisionError("no such luck")

    monkeypatch.setattr(math_rule, "verify", fails)
    with pytest.raises(Undecided, match="raised ZeroDivisionError: no such luck"):
        math("7", "7")


def test_a_pair_that_cannot_be_compared_hides_no_equal_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """math-verify compares an expression first, and then its text."""

    def fails_at_expressions(truth: object, answer: object, **settings: object) -> bool:
        if not isinstance(truth, str):
            raise ValueError("Can't evaluate nan or zoo")
        return bool(math_verify.verify(truth, answer, **settings))

    monkeypatch.setattr(math_rule, "verify", fails_at_expressions)
    assert math(r"\boxed{12:00}", "12:00") == 1


def test_math_in_a_thread_raises() -> None:
    """Calling `math` outside the main thread is an error of the caller, not of the response."""
    with ThreadPoolExecutor(1) as pool, pytest.raises(ValueError, match="main thread"):
        pool.submit(math, "7", "7").result()


def test_the_signals_of_a_rule_are_its_own_again() -> None:
    taken: list[int] = []
    before = signal.signal(signal.SIGPROF, lambda number, _: taken.append(number))
    limits = [resource.getrlimit(which) for which in (resource.RLIMIT_CPU, resource.RLIMIT_DATA)]
    try:
        with pytest.raises(Undecided):
            math(SLOW["tower"], "7", seconds=0.05)
        assert signal.getitimer(signal.ITIMER_PROF) == (0, 0)
        signal.raise_signal(signal.SIGPROF)
    finally:
        signal.signal(signal.SIGPROF, before)
    assert taken == [signal.SIGPROF]
    assert [resource.getrlimit(which) for which in (resource.RLIMIT_CPU, resource.RLIMIT_DATA)] == limits


@pytest.mark.parametrize(
    ("truth", "can"),
    [
        *[(truth, 1) for truth in ("18", r"\$18", "2024-01-05", r"\text{Monday}", "The answer is 5", "5:30", "x = 3")],
        *[(truth, 0) for truth in ("", "   ", "$", "$$", "''", r"\$")],
    ],
)
def test_a_ground_truth_without_a_match_is_found(truth: str, can: int) -> None:
    assert can_be_matched(truth) == can


def test_dates_and_times_are_read_as_sums_and_quotients() -> None:
    """Described in docs/rewards.md."""
    assert math(r"\boxed{2024-01-05}", "2024-01-05") == 1
    assert math(r"\boxed{2018}", "2024-01-05") == 1, "2024 - 1 - 5"
    assert math(r"\boxed{1/6}", "5:30") == 1
