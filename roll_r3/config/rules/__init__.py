"""The rule table: combinations of fields that cannot work, or that would leave a setting unread.

One module a topic. Rows that need more than the YAML (the model, what strategies can do, files, versions) are in
`roll_r3.preflight`.
"""

from __future__ import annotations

from roll_r3.config.pipeline import RLVRConfig
from roll_r3.config.report import Finding
from roll_r3.config.rules import algorithm, batching, data, devices, layout, replay, rollout, saving, waiting
from roll_r3.config.rules.table import AnyRule, check_rows

RULES: tuple[AnyRule, ...] = (
    *replay.RULES,
    *devices.RULES,
    *layout.RULES,
    *batching.RULES,
    *algorithm.RULES,
    *rollout.RULES,
    *data.RULES,
    *saving.RULES,
    *waiting.RULES,
)


def check_rules(config: RLVRConfig) -> list[Finding]:
    """Every violation of `RULES`, in the order of the table."""
    return check_rows(config, RULES)
