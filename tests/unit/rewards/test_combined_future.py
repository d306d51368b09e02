"""One future for the results of many."""

from __future__ import annotations

from concurrent.futures import CancelledError, Future

import pytest

from roll_r3.rewards.combined_future import gathered


def test_results_are_combined_in_order() -> None:
    parts: list[Future[int]] = [Future() for _ in range(3)]
    whole = gathered(parts, lambda found: found)
    for number in (2, 0, 1):
        assert not whole.done()
        parts[number].set_result(number)
    assert whole.result() == [0, 1, 2]
    assert gathered([], sum).result() == 0


def test_an_error_of_a_part_or_of_the_combination_is_kept() -> None:
    parts: list[Future[int]] = [Future(), Future()]
    whole = gathered(parts, sum)
    parts[1].set_exception(ValueError("odd"))
    parts[0].set_result(1)
    with pytest.raises(ValueError, match="odd"):
        whole.result()
    done: Future[int] = Future()
    done.set_result(0)
    with pytest.raises(ZeroDivisionError):
        gathered([done], lambda found: 1 / found[0]).result()


def test_cancelling_leaves_running_parts_alone() -> None:
    parts: list[Future[int]] = [Future(), Future()]
    parts[0].set_running_or_notify_cancel()
    whole = gathered([gathered(parts, sum)], sum)
    assert whole.cancel()
    assert (parts[0].cancelled(), parts[1].cancelled()) == (False, True)
    parts[0].set_result(3)
    with pytest.raises(CancelledError):
        whole.result()
