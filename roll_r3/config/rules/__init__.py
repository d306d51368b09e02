"""The rule table: combinations of fields without a meaning, and settings without effect.

One module per topic. Rules about more than the YAML (model, capabilities of strategies, files, versions) are in
`roll_r3.preflight`.
"""

from __future__ import annotations

from roll_r3.config.findings.report import Finding
from roll_r3.config.pipeline import RLVRConfig
from roll_r3.config.rules import (
    advantages,
    algorithm,
    batching,
    choices,
    corrections,
    data,
    devices,
    evaluation,
    groups,
    layout,
    losses,
    replay,
    rewards,
    rollout,
    saving,
    tracking,
    variables,
    waiting,
)
from roll_r3.config.rules.table import AnyRule, check_rows

RULES: tuple[AnyRule, ...] = (
    *replay.RULES,
    *devices.RULES,
    *layout.RULES,
    *batching.RULES,
    *algorithm.RULES,
    *choices.RULES,
    *advantages.RULES,
    *losses.RULES,
    *corrections.RULES,
    *rollout.RULES,
    *data.RULES,
    *rewards.RULES,
    *groups.RULES,
    *evaluation.RULES,
    *saving.RULES,
    *tracking.RULES,
    *variables.RULES,
    *waiting.RULES,
)


def check_rules(config: RLVRConfig) -> list[Finding]:
    """Return every violation of `RULES`, in the order of the table."""
    return check_rows(config, RULES)
