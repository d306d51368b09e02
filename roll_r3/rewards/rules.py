"""Rewards that a rule decides: built in by name, or `package.module:function` of the user's own.

A rule is called as `rule(response, ground_truth, **kwargs) -> float` with the response's text.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib import import_module

from roll_r3.config.pipeline import RewardConfig
from roll_r3.errors import ConfigError, RollError

RewardRule = Callable[..., float]


def exact_match(response: str, ground_truth: str) -> float:
    """1 if the response is the ground truth, white space at both ends aside; else 0."""
    return float(response.strip() == ground_truth.strip())


def math(response: str, ground_truth: str) -> float:
    """1 if math-verify finds the response's final answer equal to the ground truth; else 0."""
    from math_verify import parse, verify  # noqa: PLC0415  an import of a second that most runs do not need

    # time limits of math-verify work by signals in the main thread only; a rule may run in another one
    gold = parse(f"${ground_truth}$" if "$" not in ground_truth else ground_truth, parsing_timeout=None)
    return float(verify(gold, parse(response, parsing_timeout=None), timeout_seconds=None))


BUILT_IN: dict[str, RewardRule] = {"exact_match": exact_match, "math": math}


class Rewards:
    """The rules of a run, each for its domains."""

    def __init__(self, configs: Mapping[str, RewardConfig]) -> None:
        """Look every rule up at once.

        Raises:
            ConfigError: a rule that does not exist, or a domain that two rules claim.
        """
        self._by_domain: dict[str, tuple[str, RewardRule, RewardConfig]] = {}
        self._default: tuple[str, RewardRule, RewardConfig] | None = None
        for name, config in configs.items():
            entry = (name, find_rule(config.reward, f"rewards.{name}.reward"), config)
            for domain in config.tag_included:
                if domain in self._by_domain:
                    raise ConfigError(f"rewards.{name}.tag_included: domain {domain!r} has two reward rules")
                self._by_domain[domain] = entry
            if not config.tag_included:
                if self._default is not None:
                    raise ConfigError(
                        f"rewards.{name} and rewards.{self._default[0]} both score all other domains: "
                        "name domains in tag_included"
                    )
                self._default = entry

    def check_domains(self, domains: set[str]) -> None:
        """Raises ConfigError when a domain of the data has no rule."""
        lost = sorted(d for d in domains if d not in self._by_domain) if self._default is None else []
        if lost:
            raise ConfigError(f"rewards: no rule scores the domains {', '.join(lost)}; name them in a tag_included")

    def score(self, response: str, ground_truth: str, domain: str) -> float:
        """The reward of one response.

        Raises:
            RollError: the rule raised; the text names the rule and the response.
        """
        entry = self._by_domain.get(domain, self._default)
        assert entry is not None, f"domain {domain} was not checked"
        name, rule, config = entry
        try:
            return float(rule(response, ground_truth, **config.kwargs))
        except Exception as error:
            raise RollError(
                f"rewards.{name} ({config.reward}) raised {type(error).__name__}: {error} "
                f"for the response {response[:200]!r} (ground truth {ground_truth[:100]!r})"
            ) from error


def find_rule(reward: str, field: str) -> RewardRule:
    """A built-in rule, or the function that `package.module:function` names. Raises ConfigError naming `field`."""
    if reward in BUILT_IN:
        return BUILT_IN[reward]
    module, colon, attribute = reward.partition(":")
    if not colon:
        raise ConfigError(f"{field}: {reward!r} is neither {', '.join(BUILT_IN)} nor package.module:function")
    try:
        rule = getattr(import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise ConfigError(f"{field}: cannot import {reward!r}: {error}") from error
    if not callable(rule):
        raise ConfigError(f"{field}: {reward!r} is not a function")
    return rule
