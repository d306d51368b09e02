"""Rewards of a run: choice of the rule for each response, and handling of failures."""

from __future__ import annotations

import logging
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

from roll_r3.config.sections import RewardConfig
from roll_r3.errors import ConfigError, RollError
from roll_r3.rewards.functions import Response
from roll_r3.rewards.process_pool import RewardProcesses
from roll_r3.rewards.reward_process import Answer as RuleAnswer
from roll_r3.rewards.reward_process import Failure, Task, Undecided
from roll_r3.rewards.rules import Rule
from roll_r3.rewards.truths import Truth, check_rules, check_truths

logger = logging.getLogger(__name__)

_SHOWN_REASONS = 3
_SHOWN_DOMAINS = 8
_NO_DOMAIN = "default"
"""Domain of all rows if the data has no domain column."""
_SHOWN_RESPONSE, _SHOWN_TRUTH = 200, 100
_JUDGE_GRACE_S = 60.0
"""Seconds of wall time beyond the limit of `math`, which counts processor time, until its process is killed."""


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

    @property
    def failed(self) -> int:
        return sum(score is None for score in self.scores)


class Rewards:
    """Rules of a run with their domains, and the processes for them."""

    def __init__(self, rewards: Mapping[str, RewardConfig], workers: int, max_failed: float, log_dir: Path) -> None:
        """Prepare the rules without starting a process.

        Args:
            rewards: rules by name.
            workers: number of processes.
            max_failed: share of a step's responses that may have no reward.
            log_dir: directory of rewards-<number>.log, the output of the rules.

        Raises:
            ConfigError: two rules for one domain.
        """
        self._rules = [_rule(name, reward) for name, reward in rewards.items()]
        self._skips_special = [reward.skip_special_tokens for reward in rewards.values()]
        self._by_domain: dict[str, int] = {}
        self._default: int | None = None
        self._max_failed = max_failed
        for index, (name, reward) in enumerate(rewards.items()):
            for domain in reward.tag_included:
                if domain in self._by_domain:
                    raise ConfigError(f"rewards.{name}.tag_included: domain {domain!r} has two reward rules")
                self._by_domain[domain] = index
            if not reward.tag_included:
                if self._default is not None:
                    raise ConfigError(
                        f"rewards.{name} and rewards.{self._rules[self._default].name} both score all other domains: "
                        "name domains in tag_included"
                    )
                self._default = index
        self._truth_checks = check_rules(self._rules)
        rules = [*self._rules, *self._truth_checks.values()]
        self._processes = RewardProcesses(rules, workers, log_dir)
        self._thread = ThreadPoolExecutor(1, "rewards")

    def __enter__(self) -> Self:
        """Start the processes, without waiting for them."""
        self._processes.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._thread.shutdown(wait=True, cancel_futures=True)
        self._processes.close()

    def check_domains(self, domains: set[str]) -> None:
        """Raise ConfigError if a domain of the data has no rule."""
        lost = sorted(d for d in domains if d not in self._by_domain) if self._default is None else []
        if lost:
            raise ConfigError(f"rewards: no rule scores the domains {', '.join(lost)}; name them in a tag_included")

    def shares(self, domains: Mapping[str, int]) -> str:
        """Describe each rule's prompts and domains in one line.

        Args:
            domains: domain -> number of prompts; accepted by `check_domains`.
        """
        parts = []
        for index, rule in enumerate(self._rules):
            of = {domain: number for domain, number in domains.items() if self._rule_of(domain) == index}
            rest = {domain: number for domain, number in of.items() if domain not in self._by_domain}
            detail = [_listed({domain: number for domain, number in of.items() if domain in self._by_domain})]
            if set(domains) != {_NO_DOMAIN}:
                detail.append(f"without a rule of their own: {_listed(rest)}" if rest else "")
            shown = "; ".join(filter(None, detail))
            parts.append(
                f"{rule.name} ({rule.reward}) scores {sum(of.values()):,} prompts" + (f" [{shown}]" if shown else "")
            )
        return f"rewards: {', '.join(parts)}"

    def wait_until_ready(self) -> None:
        """Wait until every process has imported every rule.

        Raises:
            ConfigError: an import failed, or a rule cannot be called.
        """
        self._processes.wait_until_ready()

    def check_truths(self, truths: Iterable[Truth]) -> None:
        """Raise ConfigError if no response can match some ground truth under the rule of its domain."""
        by_rule = defaultdict(list)
        for truth in truths:
            by_rule[self._rule_of(truth.domain)].append(truth)
        check_truths(
            self._processes,
            [(self._rules[i], len(self._rules) + n, by_rule[i]) for n, i in enumerate(self._truth_checks)],
        )

    def section_of(self, domain: str) -> str:
        """Return the name of the first section of `rewards` that scores a domain."""
        return self._rules[self._rule_of(domain)].name

    def skips_special_tokens(self, domain: str) -> bool:
        """Return True if the rule of a domain reads responses without special tokens."""
        return self._skips_special[self._rule_of(domain)]

    def begin(self, responses: Sequence[Response]) -> Future[list[Answer]]:
        """Begin to score responses, and return at once. Many calls may be open, scored in the order of arrival."""
        return self._thread.submit(self._answers, responses)

    def accept(self, responses: Sequence[Response], answers: Sequence[Answer]) -> Scores:
        """Return the rewards of a step's responses, and log each failure.

        Raises:
            RollError: more than `max_failed_rewards` of the responses failed; with the reasons.
        """
        odd = {index: answer for index, answer in enumerate(answers) if answer.why}
        failures = {index: answer for index, answer in odd.items() if answer.score is None}
        self._log(responses, odd)
        if len(failures) > int(self._max_failed * len(responses)):
            raise RollError(
                f"{len(failures)} of the step's {len(responses)} responses have no reward, more than "
                f"max_failed_rewards {self._max_failed:g} allows: {self._summary(responses, failures)}. Fix the "
                "rule; its output is in logs/rewards-*.log, the responses are in logs/driver.log"
            )
        undecided = sum(answer.undecided for answer in answers)
        return Scores([answer.score for answer in answers], self._summary(responses, failures), undecided)

    def score(self, responses: Sequence[Response]) -> Scores:
        """Score a step's responses and wait for the result. Raises as `accept`."""
        return self.accept(responses, self.begin(responses).result())

    def _answers(self, responses: Sequence[Response]) -> list[Answer]:
        tasks = [Task(self._rule_of(response.domain), response) for response in responses]
        found = self._processes.score(tasks, len(tasks))
        return [self._answer(task, answer) for task, answer in zip(tasks, found, strict=True)]

    def _answer(self, task: Task, answer: RuleAnswer) -> Answer:
        if isinstance(answer, Failure):
            return Answer(None, {}, answer.reason)
        if isinstance(answer, Undecided):
            return Answer(0.0, {self._rules[task.rule].name: 0.0}, answer.reason, undecided=True)
        return Answer(answer, {self._rules[task.rule].name: answer})

    def _rule_of(self, domain: str) -> int:
        index = self._by_domain.get(domain, self._default)
        assert index is not None, f"domain {domain} was not checked"
        return index

    def _log(self, responses: Sequence[Response], odd: Mapping[int, Answer]) -> None:
        for index, answer in sorted(odd.items()):
            response = responses[index]
            logger.warning(
                "%s %s for the response %r (ground truth %r)%s",
                self._rules[self._rule_of(response.domain)],
                answer.why,
                response.response[:_SHOWN_RESPONSE],
                response.ground_truth[:_SHOWN_TRUTH],
                "; it scores 0" if answer.undecided else "",
            )

    def _summary(self, responses: Sequence[Response], failures: Mapping[int, Answer]) -> str:
        """Summarise the most frequent reasons."""
        counts = Counter(
            f"{self._rules[self._rule_of(responses[index].domain)]} {failure.why}"
            for index, failure in sorted(failures.items())
        )
        shown = [f"{text} ({n} times)" if n > 1 else text for text, n in counts.most_common(_SHOWN_REASONS)]
        more = [f"and {len(counts) - _SHOWN_REASONS} other reasons"] if len(counts) > _SHOWN_REASONS else []
        return "; ".join(shown + more)


def _rule(name: str, reward: RewardConfig) -> Rule:
    if reward.reward != "math":
        return Rule(name, reward.reward, dict(reward.kwargs), reward.time_limit)
    kwargs = reward.kwargs | {"seconds": reward.time_limit}
    return Rule(name, reward.reward, kwargs, reward.time_limit + _JUDGE_GRACE_S, judge=True)


def _listed(domains: Mapping[str, int]) -> str:
    """Format domains with their number of prompts, the largest first."""
    shown = [f"{domain} {number:,}" for domain, number in Counter(domains).most_common(_SHOWN_DOMAINS)]
    more = [f"{len(domains) - len(shown)} more"] if len(domains) > len(shown) else []
    return ", ".join(shown + more)
