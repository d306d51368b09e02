"""Rewards of a run: scores of responses by the rules of their domains, and handling of failures."""

from __future__ import annotations

import logging
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import Future, as_completed
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Self

from roll_r3.config.rewards import JUDGE, RewardConfig
from roll_r3.errors import ConfigError, RollError
from roll_r3.rewards.choice import RuleChoice
from roll_r3.rewards.code.sandbox import SandboxError, weaknesses
from roll_r3.rewards.combined_future import gathered
from roll_r3.rewards.functions import Response
from roll_r3.rewards.judge.judges import Judges
from roll_r3.rewards.process_pool import RewardProcesses
from roll_r3.rewards.reward_process import Answer as RuleAnswer
from roll_r3.rewards.reward_process import Failure, Task, Undecided
from roll_r3.rewards.rules import Rule
from roll_r3.rewards.truths import Truth, check_rules, check_truths

logger = logging.getLogger(__name__)

_SHOWN_REASONS = 3
_SHOWN_RESPONSE, _SHOWN_TRUTH = 200, 100
_LIMIT_ARGUMENTS = {"code": "total_seconds", "math": "seconds"}
"""Built-in rule with an own time limit, scoring 0 past it -> its argument with the limit."""
_GRACE_S = 60.0
"""Seconds of wall time beyond the limit of such a rule until its process is killed."""


@dataclass(frozen=True)
class Answer:
    """Outcome of scoring one response."""

    score: float | None
    """None: a rule failed, and the response is left out of the step."""
    parts: Mapping[str, float]
    """Score of each rule, by its name in `rewards`, before weights."""
    why: str = ""
    """Reason for a missing score, or for a score of 0 because a judge could not decide."""
    undecided: bool = False
    """True if a judge could not decide."""


@dataclass(frozen=True)
class Scores:
    """Scores of a step's responses, in their order."""

    scores: list[float | None]
    """None: the rule failed, and the response is left out of the step."""
    why: str
    """Reasons for missing scores; empty if there are none."""
    undecided: int = 0
    """Number of responses scored 0 because a judge could not decide."""
    by_rule: Mapping[str, float] = field(default_factory=dict)
    """Mean score of each rule over its scored responses, before weights."""

    @property
    def failed(self) -> int:
        return sum(score is None for score in self.scores)


class Rewards:
    """Rules of a run with their domains, the processes for them, and the judges."""

    def __init__(self, rewards: Mapping[str, RewardConfig], workers: int, max_failed: float, log_dir: Path) -> None:
        """Prepare the rules without starting a process.

        Args:
            rewards: rules by name.
            workers: number of processes.
            max_failed: share of a step's responses that may have no reward.
            log_dir: directory of rewards-<number>.log, the output of the rules.
        """
        self._choice = RuleChoice(rewards)
        self._rules = [_rule(name, reward) for name, reward in rewards.items()]
        self._weights = [reward.weight for reward in rewards.values()]
        self._max_failed = max_failed
        self._judges = Judges({i: r.judge for i, r in enumerate(rewards.values()) if r.judge is not None})
        in_processes = [i for i, rule in enumerate(self._rules) if rule.reward != JUDGE]
        self._places = {index: place for place, index in enumerate(in_processes)}
        """Index of a rule -> its index in the processes; judges have none."""
        self._truth_checks = check_rules(self._rules)
        rules = [*(self._rules[i] for i in in_processes), *self._truth_checks.values()]
        self._processes = RewardProcesses(rules, workers if rules else 0, log_dir)

    def __enter__(self) -> Self:
        """Start the processes, without waiting for them.

        Raises:
            ConfigError: code cannot be run on this machine, or a judge's key is missing.
        """
        for rule in [rule for rule in self._rules if rule.reward == "code"][:1]:
            _check_sandbox(rule)
        self._judges.start()
        self._processes.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._judges.close()
        self._processes.close()

    def check_domains(self, domains: set[str]) -> None:
        """Raise ConfigError if a domain of the data has no rule."""
        self._choice.check(domains)

    def shares(self, domains: Mapping[str, int]) -> str:
        """Describe each rule's prompts and domains in one line.

        Args:
            domains: domain -> number of prompts; accepted by `check_domains`.
        """
        return self._choice.shares(domains)

    def wait_until_ready(self) -> None:
        """Wait until every process has imported every rule.

        Raises:
            ConfigError: an import failed, or a rule cannot be called.
        """
        self._processes.wait_until_ready()

    def check_truths(self, truths: Iterable[Truth]) -> None:
        """Raise ConfigError if no response to some row can get a reward from a rule of its domain."""
        by_rule = defaultdict(list)
        for truth in truths:
            for index in self._choice.of(truth.domain):
                by_rule[index].append(truth)
        first = len(self._places)
        check_truths(
            self._processes,
            [(self._rules[i], first + n, by_rule[i]) for n, i in enumerate(self._truth_checks)],
        )

    def section_of(self, domain: str) -> str:
        """Return the name of a domain's first section in `rewards`."""
        return self._choice.section_of(domain)

    def skips_special_tokens(self, domain: str) -> bool:
        """Return True if the rules of a domain read responses without special tokens."""
        return self._choice.skips_special_tokens(domain)

    def begin(self, responses: Sequence[Response]) -> Future[list[Answer]]:
        """Begin to score responses, and return at once. Many calls may be open, scored in the order of arrival.

        A cancelled future leaves out all not begun yet.
        """
        return gathered([self._begin(response) for response in responses], list)

    def accept(self, responses: Sequence[Response], answers: Sequence[Answer]) -> Scores:
        """Return the rewards of a step's responses, and log each failure.

        Raises:
            RollError: more than `max_failed_rewards` of the responses failed; with the reasons.
        """
        odd = {index: answer for index, answer in enumerate(answers) if answer.why}
        failures = {index: answer for index, answer in odd.items() if answer.score is None}
        self._log(responses, odd)
        if len(failures) > self._allowed(responses):
            raise RollError(
                f"{len(failures)} of the step's {len(responses)} responses have no reward, more than "
                f"max_failed_rewards {self._max_failed:g} allows: {_summary(failures)}. Fix the "
                "rule; its output is in logs/rewards-*.log, the responses are in logs/driver.log"
            )
        undecided = sum(answer.undecided for answer in answers)
        return Scores([answer.score for answer in answers], _summary(failures), undecided, _means(answers))

    def wait_for(self, groups: Sequence[tuple[Sequence[Response], Future[list[Answer]]]]) -> list[Answer]:
        """Wait for the answers to groups of responses, and return those of all groups in their order.

        The wait ends once more responses have failed than `accept` allows: a rule that hangs would take hours. Answers
        that are missing then have no score and no reason.
        """
        allowed = self._allowed([response for responses, _ in groups for response in responses])
        failed = 0
        try:
            for done in as_completed([answers for _, answers in groups]):
                failed += sum(answer.score is None for answer in done.result())
                if failed > allowed:
                    break
            unknown = Answer(None, {})
            found = [answers.result() if answers.done() else [unknown] * len(asked) for asked, answers in groups]
        finally:
            for _, answers in groups:
                answers.cancel()
        return [answer for answers in found for answer in answers]

    def score(self, responses: Sequence[Response]) -> Scores:
        """Score a step's responses and wait for the result. Raises as `accept`, as soon as too many have failed."""
        return self.accept(responses, self.wait_for([([each], self.begin([each])) for each in responses]))

    def _allowed(self, responses: Sequence[Response]) -> int:
        return int(self._max_failed * len(responses))

    def _begin(self, response: Response) -> Future[Answer]:
        """Begin to score one response by all rules of its domain."""
        indexes = self._choice.of(response.domain)
        parts = [self._begin_rule(index, response) for index in indexes]
        return gathered(parts, lambda answers: self._answer(indexes, answers))

    def _begin_rule(self, index: int, response: Response) -> Future[RuleAnswer]:
        place = self._places.get(index)
        if place is None:
            return self._judges.submit(index, response)
        return self._processes.submit([Task(place, response)])[0]

    def _answer(self, indexes: Sequence[int], answers: Sequence[RuleAnswer]) -> Answer:
        parts: dict[str, float] = {}
        reasons: list[str] = []
        score, failed, undecided = 0.0, False, False
        for index, answer in zip(indexes, answers, strict=True):
            rule = self._rules[index]
            if isinstance(answer, Failure | Undecided):
                reasons.append(f"{rule} {answer.reason}")
            if isinstance(answer, Failure):
                failed = True
                continue
            undecided |= isinstance(answer, Undecided)
            parts[rule.name] = 0.0 if isinstance(answer, Undecided) else answer
            score += self._weights[index] * parts[rule.name]
        return Answer(None if failed else score, parts, "; ".join(reasons), undecided)

    def _log(self, responses: Sequence[Response], odd: Mapping[int, Answer]) -> None:
        for index, answer in sorted(odd.items()):
            response = responses[index]
            logger.warning(
                "%s for the response %r (ground truth %r)%s",
                answer.why,
                response.response[:_SHOWN_RESPONSE],
                response.ground_truth[:_SHOWN_TRUTH],
                "" if answer.score is None else f"; it scores {answer.score:g}",
            )


def _rule(name: str, reward: RewardConfig) -> Rule:
    argument = _LIMIT_ARGUMENTS.get(reward.reward)
    if argument is None:
        return Rule(name, reward.reward, dict(reward.kwargs), reward.time_limit)
    kwargs = reward.kwargs | {argument: reward.time_limit}
    return Rule(name, reward.reward, kwargs, reward.time_limit + _GRACE_S, judge=reward.reward == "math")


def _check_sandbox(rule: Rule) -> None:
    """Log the weaknesses of the sandbox on this machine.

    Raises:
        ConfigError: there is no sandbox.
    """
    try:
        found = weaknesses()
    except SandboxError as error:
        raise ConfigError(f"{rule}: programs cannot be confined on this machine: {error}") from error
    if found:
        logger.warning("%s: this machine confines a response's program in part only: %s", rule, found)


def _means(answers: Sequence[Answer]) -> dict[str, float]:
    found = defaultdict(list)
    for answer in answers:
        for name, score in answer.parts.items():
            found[name].append(score)
    return {name: sum(scores) / len(scores) for name, scores in found.items()}


def _summary(failures: Mapping[int, Answer]) -> str:
    """Summarise the most frequent reasons."""
    counts = Counter(failure.why for _, failure in sorted(failures.items()))
    shown = [f"{text} ({n} times)" if n > 1 else text for text, n in counts.most_common(_SHOWN_REASONS)]
    more = [f"and {len(counts) - _SHOWN_REASONS} other reasons"] if len(counts) > _SHOWN_REASONS else []
    return "; ".join(shown + more)
