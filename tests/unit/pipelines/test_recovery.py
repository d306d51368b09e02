"""Number of automatic restarts of a run."""

from __future__ import annotations

import pytest

from roll_r3.errors import LostWorkerError
from roll_r3.pipelines.lifecycle.recovery import Recoveries

LOSS = LostWorkerError("actor_train-1 died")


def spend(limit: int, *reached: int, begun: int = 0) -> Recoveries:
    recoveries = Recoveries(limit, begun)
    for step in reached:
        recoveries.spend(LOSS, step)
    return recoveries


def test_as_many_in_a_row_as_allowed_that_get_no_further():
    assert spend(3, 5, 5, 3).count == 3
    with pytest.raises(LostWorkerError, match=r"actor_train-1 died\n.*not get past step 5 in 3 restarts"):
        spend(3, 5, 5, 3, 5)


def test_a_step_more_begins_the_count_again():
    assert spend(1, 5, 6, 7).count == 1


def test_before_the_first_step_it_is_a_setting_more_often():
    with pytest.raises(LostWorkerError, match="had not made a step since it was started"):
        spend(3, 4, begun=4)
    assert spend(3, 5, 4, begun=4).count == 2, "but a start after a loss may fail early"


def test_none_where_none_is_wanted():
    with pytest.raises(LostWorkerError) as raised:
        spend(0, 5)
    assert raised.value is LOSS
