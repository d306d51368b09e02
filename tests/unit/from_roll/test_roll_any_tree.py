"""Arbitrary values under ROLL's keys: nothing raises and nothing is lost."""

from __future__ import annotations

import copy
from collections import Counter
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from roll_r3.config.findings.report import ABSENT
from roll_r3.from_roll.translate import translate
from tests.unit.from_roll.cases import (
    ENGINE,
    FOLDER,
    KEYS,
    LAYOUT,
    at,
    concrete,
    for_pattern,
    of_roll,
    put,
    read,
    run,
    trees,
)

KNOWN = {key.partition(".")[0] for key in KEYS} | {"actor_train", "actor_infer", "reference"}


@given(st.dictionaries(st.text(max_size=6), trees, max_size=5))
def test_any_tree_passes_and_is_not_touched_without_a_known_key(data):
    before = copy.deepcopy(data)
    translated, _, findings = translate(data, {})
    assert repr(data) == repr(before)
    if not KNOWN & data.keys():
        assert repr(translated) == repr(data)
        assert findings == []


@given(
    st.dictionaries(
        st.sampled_from(KEYS), trees | st.sampled_from([True, False, "group", "sglang", "full", 1]), max_size=12
    ),
    st.booleans(),
)
def test_any_value_of_any_key_passes(values, is_rolls):
    data: dict[str, Any] = of_roll() if is_rolls else {}
    for key, value in values.items():
        try:
            data = put(for_pattern(data, key), concrete(key), value)
        except (AttributeError, TypeError):
            continue  # something else than a section stands above the key
    before = copy.deepcopy(data)
    translated, _, findings = translate(data, {})
    assert repr(data) == repr(before)
    assert Counter(f.rule for f in findings)["roll-unsupported"] <= 1
    assert Counter(f.rule for f in findings)["roll-unread"] <= 1
    for path, _ in (item for f in findings if f.rule in ("roll-unsupported", "roll-unread") for item in f.found):
        assert at(translated, path) is ABSENT, path


SECTIONS = ["", "actor_train", "actor_train.model_args", "actor_train.training_args", "actor_train.data_args", LAYOUT]

SECTIONS += ["actor_infer", "actor_infer.generating_args", ENGINE, "reference", "rewards.math_rule"]


@given(st.sampled_from(SECTIONS), trees)
def test_an_unknown_key_survives_wherever_it_stands(section, value):
    data, _ = read(FOLDER / "sglang.yaml")
    path = f"{section}.of_nobody" if section else "of_nobody"
    translated, _ = run(put(data, path, value))
    assert repr(at(translated, path)) == repr(value)


SECTIONS_OF_ROLLS: dict[str, dict[str, Any]] = {
    "train_infer_correction": {"is_weight": {"enabled": False}, "filters": []},
    "train_infer_correction.is_weight": {"enabled": True},
    "actor_train.sequence_packing_args": {"algorithm": "none"},
    "rewards.math_rule.query_filter_config": {"filter_args": {}},
    "rollout_mock": {"mode": "dump"},
}


@pytest.mark.parametrize("section", SECTIONS_OF_ROLLS)
def test_an_unknown_key_survives_in_a_section_of_rolls(section):
    data = put(of_roll(), section, SECTIONS_OF_ROLLS[section] | {"of_nobody": 3})
    assert at(run(data)[0], section) == {"of_nobody": 3}
