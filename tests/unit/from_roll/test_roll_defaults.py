"""ROLL's defaults for missing fields."""

from __future__ import annotations

import pytest

from roll_r3.config.findings.report import ABSENT
from roll_r3.config.pipeline import RLVRConfig
from roll_r3.config.reading.field_paths import annotations_at
from roll_r3.from_roll.defaults import CONDITIONAL, DEFAULTS
from tests.unit.from_roll.cases import at, of_roll, put, run


def test_a_section_that_is_none_takes_no_defaults():
    translated, _ = run(of_roll(actor_infer=3))
    assert translated["actor_infer"] == 3
    assert translated["loss_agg_mode"] == "seq-mean-token-mean"


def test_rolls_defaults_hold_for_rolls_files_only():
    translated, named = run(of_roll(num_return_sequences_in_group=ABSENT, actor_infer__generating_args=ABSENT))
    assert {path: at(translated, path) for path in DEFAULTS} == DEFAULTS
    assert set(named["roll-defaults"]) == set(DEFAULTS)
    ours = of_roll(rewards={}, actor_train__data_args__domain_interleave_probs=ABSENT)
    assert run(ours) == (ours, {})


@pytest.mark.parametrize("sign", ["rewards.math_rule.worker_cls", "actor_train.data_args.domain_interleave_probs"])
def test_either_sign_makes_a_file_rolls(sign):
    assert "roll-defaults" in run(put(of_roll(), sign, ABSENT))[1]


def test_every_default_is_a_field_and_differs_from_ours():
    ours = RLVRConfig.model_validate(
        {"exp_name": "x", "pretrain": "x", "actor_train": {}, "actor_infer": {}}
    ).model_dump()
    for path, value in (DEFAULTS | {path: value for path, value, *_ in CONDITIONAL}).items():
        assert annotations_at(path), path
        assert at(ours, path) != value, path
