"""Ground truths that no response can match: found before the first step, in the processes that judge later."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace

from roll_r3.config.readable import printable
from roll_r3.errors import ConfigError
from roll_r3.rewards.calls import Response
from roll_r3.rewards.process import Answer, Failure, Task, Undecided
from roll_r3.rewards.processes import RewardProcesses
from roll_r3.rewards.rules import TRUTH_CHECKS, Rule

logger = logging.getLogger(__name__)

_SHOWN = 5
_SHOWN_TRUTH = 60


@dataclass(frozen=True)
class Truth:
    """The ground truth of a row."""

    prompt_id: str
    domain: str
    text: str


def check_rules(rules: Sequence[Rule]) -> dict[int, Rule]:
    """Index of a rule -> the rule that tells which ground truths it can match, where there is one."""
    checked = {i: rule for i, rule in enumerate(rules) if rule.reward in TRUTH_CHECKS}
    return {i: replace(rule, reward=TRUTH_CHECKS[rule.reward]) for i, rule in checked.items()}


def check_truths(processes: RewardProcesses, rules: Sequence[tuple[Rule, int, Sequence[Truth]]]) -> None:
    """Look at every ground truth once.

    Args:
        rules: each with the number of its check among the rules of `processes`, and the truths that it judges.

    Raises:
        ConfigError: some cannot be matched; each is in the log.
    """
    tasks = {(check, truth.text): Task(check, _unanswered(truth)) for _, check, truths in rules for truth in truths}
    answers = dict(zip(tasks, processes.score(list(tasks.values()), len(tasks)), strict=True))
    problems = []
    for rule, check, truths in rules:
        lost = [(truth, why) for truth in truths if (why := _why_not(answers[check, truth.text]))]
        for truth, why in lost:
            logger.warning("%s: ground truth %r of row %s can never be matched: it %s", rule, *_told(truth), why)
        if lost:
            problems.append(_message(rule, lost, len(truths)))
    if problems:
        raise ConfigError("\n".join(problems))


def _unanswered(truth: Truth) -> Response:
    return Response("", truth.text, truth.domain, "", (), {}, "stop", 0)


def _why_not(answer: Answer) -> str:
    """Reason why nothing matches; empty if something does."""
    if isinstance(answer, Undecided | Failure):
        return answer.reason
    return "" if answer else "is nothing that math-verify can read"


def _told(truth: Truth) -> tuple[str, str]:
    return printable(truth.text)[:_SHOWN_TRUTH], printable(truth.prompt_id)


def _message(rule: Rule, lost: Sequence[tuple[Truth, str]], of: int) -> str:
    shown = []
    for truth, why in lost[:_SHOWN]:
        text, prompt_id = _told(truth)
        shown.append(f"{text!r} of row {prompt_id} {why}")
    more = f", and {len(lost) - _SHOWN} more, which are in logs/driver.log" if len(lost) > _SHOWN else ""
    return (
        f"{rule}: {len(lost)} of {of} ground truths can never be matched, so that no response to their prompts gets a "
        f"reward: {'; '.join(shown)}{more}. Correct these rows, take them out, or give them a domain of their own with "
        "a rule that compares text (exact_match)"
    )
