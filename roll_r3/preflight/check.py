"""Whole check of a configuration: findings of loading, and every row of the rule table."""

from __future__ import annotations

from roll_r3.config.findings.report import Finding, InvalidConfigError, Origins, has_errors
from roll_r3.config.load import LoadedConfig
from roll_r3.config.pipeline import RLVRConfig
from roll_r3.config.rules import check_rules
from roll_r3.preflight.rules import PREFLIGHT_RULES
from roll_r3.preflight.surroundings import Surroundings


def check(loaded: LoadedConfig, surroundings: Surroundings) -> tuple[Finding, ...]:
    """Return all findings about a configuration, in order of discovery.

    If loading left out invalid values, findings about them are not reported.
    """
    found = check_config(loaded.config, surroundings)
    certain = [finding for finding in found if not any(map(finding.concerns, loaded.doubtful))]
    return (*loaded.findings, *certain)


def check_config(config: RLVRConfig, surroundings: Surroundings) -> list[Finding]:
    """Return every violation of the whole rule table."""
    found = check_rules(config)
    for rule in PREFLIGHT_RULES:
        found += rule.check(config, surroundings)
    return found


def require_valid(config: RLVRConfig, surroundings: Surroundings, origins: Origins) -> None:
    """Check again with new facts, for example about a downloaded checkpoint.

    Raises:
        InvalidConfigError: all errors.
    """
    findings = check_config(config, surroundings)
    if has_errors(findings):
        raise InvalidConfigError(findings, origins)
