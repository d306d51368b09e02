"""YAML files that were written for alibaba/ROLL, read as they are."""

from roll_r3.config.roll_yaml.includes import include_defaults
from roll_r3.config.roll_yaml.page import render_from_roll
from roll_r3.config.roll_yaml.translate import translate

__all__ = ["include_defaults", "render_from_roll", "translate"]
