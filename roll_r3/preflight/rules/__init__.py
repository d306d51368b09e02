"""The rest of the rule table: rows that need more than the YAML. One module a topic."""

from __future__ import annotations

from roll_r3.config.rules import RULES as CONFIG_RULES
from roll_r3.config.rules.table import Row
from roll_r3.preflight.rules import engines, fields, files, model
from roll_r3.preflight.rules.table import AnyPreflightRule

PREFLIGHT_RULES: tuple[AnyPreflightRule, ...] = (*engines.RULES, *files.RULES, *model.RULES, *fields.RULES)

ALL_RULES: tuple[Row, ...] = (*CONFIG_RULES, *PREFLIGHT_RULES)
"""Every row of the table, for those who show it."""
