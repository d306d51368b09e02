"""Check for rows without a possible reward, made before the first step in the reward processes."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from roll_r3.config.findings.readable import printable
from roll_r3.errors import ConfigError
from roll_r3.rewards.functions import Response
from roll_r3.rewards.process_pool import RewardProcesses
from roll_r3.rewards.reward_process import Answer, Failure, Task, Undecided
from roll_r3.rewards.rules import TRUTH_CHECKS, Rule

logger = logging.getLogger(__name__)

_SHOWN = 5
_SHOWN_TRUTH = 60
_BY_TEXT = "math"
"""Rule with a check of the text alone, made once for equal texts."""


@dataclass(frozen=True)
class Truth:
    """Ground truth of a row."""

    prompt_id: str
    domain: str
    text: str
    row: Mapping[str, Any] = field(default_factory=dict)
    """All columns of the row."""


def check_rules(rules: Sequence[Rule]) -> dict[int, Rule]:
    """Return index of a rule -> rule for checking its rows, where one exists."""
    checked = {i: rule for i, rule in enumerate(rules) if rule.reward in TRUTH_CHECKS}
    return {i: replace(rule, reward=TRUTH_CHECKS[rule.reward]) for i, rule in checked.items()}


def check_truths(processes: RewardProcesses, rules: Sequence[tuple[Rule, int, Sequence[Truth]]]) -> None:
    """Check every row once.

    Args:
        rules: (rule, index of its check among the rules of `processes`, its rows).

    Raises:
        ConfigError: some have no possible reward; the log has all of them.
    """
    tasks = {
        (check, _key(rule, truth)): Task(check, _empty_response(truth))
        for rule, check, truths in rules
        for truth in truths
    }
    answers = dict(zip(tasks, processes.score(list(tasks.values())), strict=True))
    problems = []
    for rule, check, truths in rules:
        reasons = [(truth, _reason_unmatched(answers[check, _key(rule, truth)])) for truth in truths]
        lost = [(truth, why) for truth, why in reasons if why]
        for truth, why in lost:
            logger.warning("%s: ground truth %r of row %s can never be matched: %s", rule, *_printable(truth), why)
        if lost:
            problems.append(_message(rule, lost, len(truths)))
    if problems:
        raise ConfigError("\n".join(problems))


def _key(rule: Rule, truth: Truth) -> str | int:
    """Return a key of the check; ids of prompts may repeat, as in files of one name."""
    return truth.text if rule.reward == _BY_TEXT else id(truth)


def _empty_response(truth: Truth) -> Response:
    return Response("", truth.text, truth.domain, "", (), truth.row, "stop", 0)


def _reason_unmatched(answer: Answer) -> str:
    """Return the reason why nothing matches; empty if a response can match."""
    if isinstance(answer, Undecided | Failure):
        return answer.reason
    return "" if answer else "cannot be parsed by math-verify"


def _printable(truth: Truth) -> tuple[str, str]:
    return printable(truth.text)[:_SHOWN_TRUTH], printable(truth.prompt_id)


def _message(rule: Rule, lost: Sequence[tuple[Truth, str]], of: int) -> str:
    shown = []
    for truth, why in lost[:_SHOWN]:
        text, prompt_id = _printable(truth)
        shown.append(f"{text!r} of row {prompt_id} {why}")
    more = f", and {len(lost) - _SHOWN} more, listed in logs/driver.log" if len(lost) > _SHOWN else ""
    return (
        f"{rule}: {len(lost)} of {of} ground truths can never be matched, so no response to their prompts gets a "
        f"reward: {'; '.join(shown)}{more}. Correct or remove these rows, or give them a domain of their own with "
        "a rule that compares text (exact_match)"
    )
