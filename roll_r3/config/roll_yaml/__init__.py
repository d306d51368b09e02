"""YAML files that were written for alibaba/ROLL, read as they are."""

from roll_r3.config.roll_yaml.includes import blame_includes, include_defaults
from roll_r3.config.roll_yaml.page import render_from_roll
from roll_r3.config.roll_yaml.pipelines import other_pipeline
from roll_r3.config.roll_yaml.signs import given
from roll_r3.config.roll_yaml.translate import dialect_of, doubt, is_key_of_rolls, translate

__all__ = [
    "blame_includes",
    "dialect_of",
    "doubt",
    "given",
    "include_defaults",
    "is_key_of_rolls",
    "other_pipeline",
    "render_from_roll",
    "translate",
]
