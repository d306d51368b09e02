"""Configurations on docs/which_loss.md: each block is accepted on the smallest configuration."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from roll_r3.config.findings.report import Finding
from roll_r3.config.pipeline import RLVRConfig
from roll_r3.config.rules import RULES, check_rules
from roll_r3.config.rules.example import MINIMAL

PAGE = Path(__file__).parents[2] / "docs/which_loss.md"
BLOCKS = [yaml.safe_load(block) for block in re.findall(r"^```yaml\n(.*?)^```$", PAGE.read_text(), re.M | re.S)]


def found(block: dict[str, Any]) -> list[Finding]:
    """Return the findings about the smallest configuration with a block on top."""
    extra: dict[str, Any] = {"response_length": 1024}
    if block.get("use_kl_loss"):
        extra["reference"] = {}
    return list(check_rules(RLVRConfig.model_validate({**yaml.safe_load(MINIMAL), **extra, **block})))


def test_the_page_has_blocks() -> None:
    """Hold the number of presets, so that the pattern finds them."""
    assert len(BLOCKS) >= 11


@pytest.mark.parametrize("block", BLOCKS, ids=[next(iter(b)) + str(i) for i, b in enumerate(BLOCKS)])
def test_every_block_is_accepted(block: dict[str, Any]) -> None:
    """Accept each block: no error, and every field of it is read."""
    assert [f.rule for f in found(block) if f.severity == "error"] == []


def test_named_rules_exist() -> None:
    """Find the rules named on the page in the table."""
    named = set(re.findall(r"`((?:r2|r3|weights|ratio)-[a-z-]+)`", PAGE.read_text()))
    assert named <= {rule.id for rule in RULES}
