"""Rewards of a run: choice of the rule for each response, and handling of failures."""

from __future__ import annotations

import logging
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

from roll_r3.config.pipeline import RewardConfig
from roll_r3.errors import ConfigError, RollError
from roll_r3.rewards.functions import Response
from roll_r3.rewards.process_pool import RewardProcesses, TooManyFailuresError
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

    def __enter__(self) -> Self:
        """Start the processes, without waiting for them."""
        self._processes.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
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

    def skips_special_tokens(self, domain: str) -> bool:
        """Return True if the rule of a domain reads responses without special tokens."""
        return self._skips_special[self._rule_of(domain)]

    def score(self, responses: Sequence[Response]) -> Scores:
        """Return the reward of each response, and log each failure.

        Raises:
            RollError: more than `max_failed_rewards` of the responses failed; with the reasons.
        """
        tasks = [Task(self._rule_of(response.domain), response) for response in responses]
        try:
            answers = self._processes.score(tasks, int(self._max_failed * len(tasks)))
        except TooManyFailuresError as error:
            self._log(responses, error.failures)
            raise RollError(
                f"{len(error.failures)} of the step's {len(tasks)} responses have no reward, more than "
                f"max_failed_rewards {self._max_failed:g} allows: {self._summary(responses, error.failures)}. Fix the "
                "rule; its output is in logs/rewards-*.log, the responses are in logs/driver.log"
            ) from error
        failures = {index: answer for index, answer in enumerate(answers) if isinstance(answer, Failure)}
        undecided = {index: answer for index, answer in enumerate(answers) if isinstance(answer, Undecided)}
        self._log(responses, {**failures, **undecided})
        scores = [
            None if isinstance(answer, Failure) else 0.0 if isinstance(answer, Undecided) else answer
            for answer in answers
        ]
        return Scores(scores, self._summary(responses, failures), len(undecided))

    def _rule_of(self, domain: str) -> int:
        index = self._by_domain.get(domain, self._default)
        assert index is not None, f"domain {domain} was not checked"
        return index

    def _log(self, responses: Sequence[Response], odd: Mapping[int, Failure | Undecided]) -> None:
        for index, answer in sorted(odd.items()):
            response = responses[index]
            logger.warning(
                "%s %s for the response %r (ground truth %r)%s",
                self._rules[self._rule_of(response.domain)],
                answer.reason,
                response.response[:_SHOWN_RESPONSE],
                response.ground_truth[:_SHOWN_TRUTH],
                "; it scores 0" if isinstance(answer, Undecided) else "",
            )

    def _summary(self, responses: Sequence[Response], failures: Mapping[int, Failure]) -> str:
        """Summarise the most frequent reasons."""
        counts = Counter(
            f"{self._rules[self._rule_of(responses[index].domain)]} {failure.reason}"
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
