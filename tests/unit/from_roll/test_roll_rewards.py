"""Messages about reward workers of ROLL without a counterpart."""

from __future__ import annotations

from roll_r3.from_roll.translate import translate
from roll_r3.rewards.functions import OFFERED
from tests.unit.from_roll.cases import of_roll


def test_the_way_out_names_all_that_a_function_may_take_and_all_that_must_go() -> None:
    _, _, findings = translate(of_roll(rewards__judge__worker_cls="x.LLMJudgeRewardWorker"), {})
    (finding,) = [each for each in findings if each.rule == "roll-unsupported"]
    assert all(name in finding.fix for name in OFFERED)
    assert "remove all of rewards.judge, and its rows" in finding.fix
