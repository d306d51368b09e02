"""The registry and the YAML models speak of the same strategies."""

from __future__ import annotations

from typing import get_args

import pytest

from roll_r3.config.workers import MegatronInferStrategy, MegatronTrainStrategy, SglangStrategy
from roll_r3.strategies.registry import STRATEGIES

SECTIONS = (SglangStrategy, MegatronTrainStrategy, MegatronInferStrategy)


def test_every_strategy_has_a_section():
    names = {name for s in SECTIONS for name in get_args(s.model_fields["strategy_name"].annotation)}
    assert names == set(STRATEGIES)


@pytest.mark.parametrize("section", SECTIONS)
def test_a_section_holds_the_strategys_own_config(section):
    name = section().strategy_name
    assert section.model_fields["strategy_config"].annotation is STRATEGIES[name].config
