"""Rows of the rule table about more than the YAML. One module per topic."""

from __future__ import annotations

from roll_r3.config.rules import RULES as CONFIG_RULES
from roll_r3.config.rules.table import Row
from roll_r3.preflight.rules import engines, fields, files, model
from roll_r3.preflight.rules.surroundings_rule import AnyPreflightRule

PREFLIGHT_RULES: tuple[AnyPreflightRule, ...] = (*engines.RULES, *files.RULES, *model.RULES, *fields.RULES)

ALL_RULES: tuple[Row, ...] = (*CONFIG_RULES, *PREFLIGHT_RULES)
"""Every row of the table, for the pages of rules."""
