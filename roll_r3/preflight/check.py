"""The whole check of a configuration: what loading found, and every row of the rule table."""

from __future__ import annotations

from roll_r3.config.load import LoadedConfig
from roll_r3.config.pipeline import RLVRConfig
from roll_r3.config.report import Finding, InvalidConfigError, Origins, has_errors
from roll_r3.config.rules import check_rules
from roll_r3.preflight.rules import PREFLIGHT_RULES
from roll_r3.preflight.surroundings import Surroundings


def check(loaded: LoadedConfig, surroundings: Surroundings) -> tuple[Finding, ...]:
    """Everything that is wrong with a configuration, in the order in which it is found.

    Of a configuration with values that had to be left out, only rules that do not look at those are applied.
    """
    found = check_config(loaded.config, surroundings)
    certain = [finding for finding in found if not any(map(finding.concerns, loaded.doubtful))]
    return (*loaded.findings, *certain)


def check_config(config: RLVRConfig, surroundings: Surroundings) -> list[Finding]:
    """Every violation of the whole rule table."""
    found = check_rules(config)
    for rule in PREFLIGHT_RULES:
        found += rule.check(config, surroundings)
    return found


def require_valid(config: RLVRConfig, surroundings: Surroundings, origins: Origins) -> None:
    """Check again, when more is known than before the start: a checkpoint that has been downloaded, say.

    Raises:
        InvalidConfigError: with all errors.
    """
    findings = check_config(config, surroundings)
    if has_errors(findings):
        raise InvalidConfigError(findings, origins)
