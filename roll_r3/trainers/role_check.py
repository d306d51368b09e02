"""What is refused before anything is built: a strategy may be started without the command line, which checks too."""

from __future__ import annotations

from roll_r3.config.derived import workers
from roll_r3.config.pipeline import RLVRConfig
from roll_r3.config.report import Origins, has_errors, render
from roll_r3.config.rules import check_rules
from roll_r3.errors import ConfigError


def check_role(config: RLVRConfig, role: str, world_size: int) -> None:
    """Refuse what cannot run as `role` on a world of so many ranks.

    Raises:
        ConfigError: a role that is not configured, an error of the rule table, or another number of devices.
    """
    section = workers(config).get(role)
    if section is None:
        raise ConfigError(f"{role} is not configured")
    findings = check_rules(config)
    if has_errors(findings):
        here = f"{role}'s configuration"
        raise ConfigError(render(findings, Origins(here, {path: here for f in findings for path, _ in f.found})))
    if len(section.device_mapping) != world_size:
        raise ConfigError(
            f"{role}.device_mapping names {len(section.device_mapping)} devices, but the world has {world_size} ranks: "
            "name one device for each"
        )
