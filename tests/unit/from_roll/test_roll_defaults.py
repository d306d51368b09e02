"""ROLL's defaults for missing fields."""

from __future__ import annotations

import pytest

from roll_r3.config.findings.report import ABSENT
from roll_r3.config.pipeline import RLVRConfig
from roll_r3.config.reading.field_paths import annotations_at
from roll_r3.from_roll.defaults import CONDITIONAL, DEFAULTS
from tests.unit.from_roll.cases import ENGINE, at, of_roll, put, run


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


def test_a_worker_of_rolls_makes_a_file_rolls():
    small = put(of_roll(), "actor_train.data_args.domain_interleave_probs", ABSENT)
    assert "roll-defaults" in run(small)[1]
    assert "roll-defaults" not in run(put(small, "rewards.math_rule.worker_cls", ABSENT))[1]


def test_every_default_is_a_field_and_differs_from_ours():
    ours = RLVRConfig.model_validate(
        {"exp_name": "x", "pretrain": "x", "actor_train": {}, "actor_infer": {}}
    ).model_dump()
    for path, value in (DEFAULTS | {path: value for path, value, *_ in CONDITIONAL}).items():
        assert annotations_at(path), path
        assert path.startswith("validation.") or at(ours, path) != value, path


@pytest.mark.parametrize(
    ("changes", "host"),
    [
        ({"actor_train__device_mapping": "range(16)", "actor_infer__device_mapping": "range(16, 24)"}, "0.0.0.0"),
        ({"actor_train__device_mapping": "range(6)", "actor_infer__device_mapping": "[6, 7]"}, ABSENT),
        (
            {
                "actor_train__device_mapping": "range(6)",
                "actor_infer__device_mapping": "[6, 7]",
                "num_gpus_per_node": 4,
            },
            "0.0.0.0",
        ),
        ({"actor_train__device_mapping": "range(16)", "actor_infer__device_mapping": "nonsense"}, ABSENT),
        (
            {
                "actor_train__device_mapping": "range(16)",
                "actor_infer__device_mapping": "range(16, 24)",
                "actor_infer__strategy_args__strategy_name": "hf_infer",
            },
            ABSENT,
        ),
    ],
)
def test_engines_of_several_nodes_listen_beyond_loopback(changes, host):
    assert at(run(of_roll(**changes))[0], f"{ENGINE}.host") == host
