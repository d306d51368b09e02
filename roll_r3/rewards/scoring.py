"""The rewards of a step: which rule scores a response, and what becomes of those that have no score."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

from roll_r3.config.pipeline import RLVRConfig
from roll_r3.errors import ConfigError, RollError
from roll_r3.rewards.processes import Failure, RewardProcesses, Task, TooManyFailuresError
from roll_r3.rewards.rules import Rule

logger = logging.getLogger(__name__)

_SHOWN_REASONS = 3
_SHOWN_DOMAINS = 8
_NO_DOMAIN = "default"
"""Domain of all rows where the data has no column for it."""
_SHOWN_RESPONSE, _SHOWN_TRUTH = 200, 100


@dataclass(frozen=True)
class Response:
    """What is to be scored."""

    text: str
    ground_truth: str
    domain: str


@dataclass(frozen=True)
class Scores:
    """Of a step's responses, in their order."""

    scores: list[float | None]
    """None: the rule failed, so the response takes no part in the step."""
    why: str
    """In a few words, of those that have none; empty where all have one."""

    @property
    def failed(self) -> int:
        return sum(score is None for score in self.scores)


class Rewards:
    """The rules of a run, each for its domains, and the processes that run them."""

    def __init__(self, config: RLVRConfig, log_dir: Path) -> None:
        """Nothing is started yet.

        Args:
            log_dir: what rules print goes to rewards-<number>.log there.

        Raises:
            ConfigError: a domain that two rules claim.
        """
        self._rules = [
            Rule(name, reward.reward, dict(reward.kwargs), reward.timeout) for name, reward in config.rewards.items()
        ]
        self._by_domain: dict[str, int] = {}
        self._default: int | None = None
        self._max_failed = config.max_failed_rewards
        for index, (name, reward) in enumerate(config.rewards.items()):
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
        self._processes = RewardProcesses(self._rules, config.reward_workers, log_dir)

    def __enter__(self) -> Self:
        """Start the processes, without waiting for them."""
        self._processes.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._processes.close()

    def check_domains(self, domains: set[str]) -> None:
        """Raises ConfigError when a domain of the data has no rule."""
        lost = sorted(d for d in domains if d not in self._by_domain) if self._default is None else []
        if lost:
            raise ConfigError(f"rewards: no rule scores the domains {', '.join(lost)}; name them in a tag_included")

    def shares(self, domains: Mapping[str, int]) -> str:
        """A line that says which rule scores how many prompts of which domains.

        Args:
            domains: prompts of each, all of which `check_domains` accepts.
        """
        parts = []
        for index, rule in enumerate(self._rules):
            of = {domain: number for domain, number in domains.items() if self._rule_of(domain) == index}
            rest = {domain: number for domain, number in of.items() if domain not in self._by_domain}
            detail = [_listed({domain: number for domain, number in of.items() if domain in self._by_domain})]
            if set(domains) != {_NO_DOMAIN}:
                detail.append(f"named by no rule: {_listed(rest)}" if rest else "")
            shown = "; ".join(filter(None, detail))
            parts.append(
                f"{rule.name} ({rule.reward}) scores {sum(of.values()):,} prompts" + (f" [{shown}]" if shown else "")
            )
        return f"rewards: {', '.join(parts)}"

    def wait_until_ready(self) -> None:
        """Until every process has imported every rule. Raises ConfigError when one could not."""
        self._processes.wait_until_ready()

    def score(self, responses: Sequence[Response]) -> Scores:
        """The reward of each response; each failure is in this process's log.

        Raises:
            RollError: more than `max_failed_rewards` of the responses have none; with the reasons.
        """
        tasks = [Task(self._rule_of(r.domain), r.text, r.ground_truth) for r in responses]
        try:
            answers = self._processes.score(tasks, int(self._max_failed * len(tasks)))
        except TooManyFailuresError as error:
            self._log(responses, error.failures)
            raise RollError(
                f"{len(error.failures)} of the step's {len(tasks)} responses have no reward, which is more than "
                f"max_failed_rewards {self._max_failed:g} allows: {self._summary(responses, error.failures)}. Mend the "
                "rule; what it printed is in logs/rewards-*.log, the responses are in logs/driver.log"
            ) from error
        failures = {index: answer for index, answer in enumerate(answers) if isinstance(answer, Failure)}
        self._log(responses, failures)
        scores = [None if isinstance(answer, Failure) else answer for answer in answers]
        return Scores(scores, self._summary(responses, failures))

    def _rule_of(self, domain: str) -> int:
        index = self._by_domain.get(domain, self._default)
        assert index is not None, f"domain {domain} was not checked"
        return index

    def _log(self, responses: Sequence[Response], failures: Mapping[int, Failure]) -> None:
        for index, failure in sorted(failures.items()):
            response = responses[index]
            logger.warning(
                "%s %s for the response %r (ground truth %r)",
                self._rules[self._rule_of(response.domain)],
                failure.reason,
                response.text[:_SHOWN_RESPONSE],
                response.ground_truth[:_SHOWN_TRUTH],
            )

    def _summary(self, responses: Sequence[Response], failures: Mapping[int, Failure]) -> str:
        """The most frequent reasons."""
        counts = Counter(
            f"{self._rules[self._rule_of(responses[index].domain)]} {failure.reason}"
            for index, failure in sorted(failures.items())
        )
        shown = [f"{text} ({n} times)" if n > 1 else text for text, n in counts.most_common(_SHOWN_REASONS)]
        more = [f"and {len(counts) - _SHOWN_REASONS} other reasons"] if len(counts) > _SHOWN_REASONS else []
        return "; ".join(shown + more)


def _listed(domains: Mapping[str, int]) -> str:
    """Domains and their prompts, the largest first."""
    shown = [f"{domain} {number:,}" for domain, number in Counter(domains).most_common(_SHOWN_DOMAINS)]
    more = [f"{len(domains) - len(shown)} more"] if len(domains) > len(shown) else []
    return ", ".join(shown + more)
