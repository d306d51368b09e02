"""The files in configs/: each has only values different from the defaults."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from roll_r3.config.derived import changed
from roll_r3.config.load import load
from roll_r3.config.tree import children, join

FILES = sorted((Path(__file__).parents[3] / "configs").glob("**/*.yaml"))
KEPT = ("strategy_args.strategy_name",)
"""Defaults written nevertheless: they are the lines to edit for another engine."""

CHOSEN = ("rewards.", "actor_train.data_args.domain_interleave_probs.")
"""Sections whose keys are names of the user's choice."""


def leaves(node: Any, path: str = "") -> Iterator[str]:
    """Dotted paths of every field in a file; a list is one value."""
    if not isinstance(node, dict) or not node:
        yield path
        return
    for key, value in children(node):
        yield from leaves(value, join(path, str(key)))


@pytest.mark.parametrize("file", FILES, ids=lambda path: path.name)
def test_it_says_only_what_differs_from_the_defaults(file):
    config = load(file).config
    for path in leaves(yaml.safe_load(file.read_text())):
        if not path.endswith(KEPT) and not path.startswith(CHOSEN):
            assert changed(config, path), f"{path} is the default"


@pytest.mark.parametrize("file", FILES, ids=lambda path: path.name)
def test_its_first_comment_says_what_it_is_for(file):
    lines = file.read_text().splitlines()
    assert lines[1].startswith("# ")
    assert "exp_name" in lines[next(i for i, line in enumerate(lines) if not line.startswith("#"))]


def test_every_experiment_has_a_name_of_its_own():
    names = [load(file).config.exp_name for file in FILES]
    assert len(set(names)) == len(names)
