"""Choice of the rules for each domain."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

from roll_r3.config.rewards import RewardConfig
from roll_r3.errors import ConfigError

_SHOWN_DOMAINS = 8
_NO_DOMAIN = "default"
"""Domain of all rows if the data has no domain column."""


class RuleChoice:
    """Rules of each domain: the rules with its name, else the rules without names."""

    def __init__(self, rewards: Mapping[str, RewardConfig]) -> None:
        self._names = list(rewards)
        self._configs = list(rewards.values())
        self._by_domain: dict[str, list[int]] = {}
        self._default: list[int] = []
        for index, reward in enumerate(self._configs):
            for domain in dict.fromkeys(reward.tag_included):
                self._by_domain.setdefault(domain, []).append(index)
            if not reward.tag_included:
                self._default.append(index)

    def of(self, domain: str) -> Sequence[int]:
        """Return the indexes of a domain's rules; the domain was accepted by `check`."""
        found = self._by_domain.get(domain, self._default)
        assert found, f"domain {domain} was not checked"
        return found

    def check(self, domains: set[str]) -> None:
        """Raise ConfigError if a domain of the data has no rule."""
        lost = sorted(d for d in domains if d not in self._by_domain) if not self._default else []
        if lost:
            raise ConfigError(f"rewards: no rule scores the domains {', '.join(lost)}; name them in a tag_included")

    def section_of(self, domain: str) -> str:
        """Return the name of a domain's first section in `rewards`."""
        return self._names[self.of(domain)[0]]

    def skips_special_tokens(self, domain: str) -> bool:
        """Return True if the rules of a domain read responses without special tokens."""
        return self._configs[self.of(domain)[0]].skip_special_tokens

    def shares(self, domains: Mapping[str, int]) -> str:
        """Describe each rule's prompts and domains in one line.

        Args:
            domains: domain -> number of prompts; accepted by `check`.
        """
        parts = []
        for index, (name, reward) in enumerate(zip(self._names, self._configs, strict=True)):
            of = {domain: number for domain, number in domains.items() if index in self.of(domain)}
            rest = {domain: number for domain, number in of.items() if domain not in self._by_domain}
            detail = [_listed({domain: number for domain, number in of.items() if domain in self._by_domain})]
            if set(domains) != {_NO_DOMAIN}:
                detail.append(f"without a rule of their own: {_listed(rest)}" if rest else "")
            shown = "; ".join(filter(None, detail))
            weight = "" if reward.weight == 1 else f", weight {reward.weight:g}"
            parts.append(
                f"{name} ({reward.reward}{weight}) scores {sum(of.values()):,} prompts"
                + (f" [{shown}]" if shown else "")
            )
        several = sum(number for domain, number in domains.items() if len(self.of(domain)) > 1)
        total = f"; {several:,} prompts have several rules, and the weighted sum as score" if several else ""
        return f"rewards: {', '.join(parts)}{total}"


def _listed(domains: Mapping[str, int]) -> str:
    """Format domains with their number of prompts, the largest first."""
    shown = [f"{domain} {number:,}" for domain, number in Counter(domains).most_common(_SHOWN_DOMAINS)]
    more = [f"{len(domains) - len(shown)} more"] if len(domains) > len(shown) else []
    return ", ".join(shown + more)
