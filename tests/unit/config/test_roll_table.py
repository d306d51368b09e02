"""The key table, and the page that is made of it."""

from __future__ import annotations

from collections import Counter

import pytest

from roll_r3.config.explain import annotations_at
from roll_r3.config.report import ABSENT
from roll_r3.config.roll_yaml import render_from_roll
from roll_r3.config.roll_yaml.pipelines import PIPELINES
from roll_r3.config.roll_yaml.rows import Moved, Off, Row, Same, Unread
from roll_r3.config.roll_yaml.signs import REQUIRED
from tests.unit.config.from_roll import ALL_ROWS, KEYS, ROOT, at, concrete, for_pattern, of_roll, put, run


def test_no_key_is_listed_twice():
    times = Counter(key for row in ALL_ROWS for key in row.keys)
    assert [key for key in times if times[key] > 1] == []


def fields(pattern: str) -> list[str]:
    """The fields of roll_r3 that a pattern names."""
    roles = {"<role>": ["actor_train", "actor_infer", "reference"], "<trainer>": ["actor_train", "reference"]}
    first, _, rest = pattern.partition(".")
    paths = [f"{role}.{rest}" if rest else role for role in roles.get(first, [concrete(first)])]
    named = for_pattern({}, pattern) or None
    return [path for path in paths if annotations_at(path.replace("*", "x"), named)]


ROLLS_OWN = [key for key in KEYS if not fields(key) and key != "defaults"]


@pytest.mark.parametrize("key", ROLLS_OWN)
def test_null_is_as_if_the_key_were_not_there(key):
    path = concrete(key)
    data = of_roll(use_kl_loss=True, reference={}) if path.startswith("reference") else of_roll()
    translated, named = run(put(for_pattern(data, key), path, None))
    assert at(translated, path) is ABSENT
    assert "roll-unread" not in named
    assert "roll-unsupported" not in named


def rows_of(kind: type) -> list[Row]:
    return [row for row in ALL_ROWS if isinstance(row.treatment, kind)]


def test_what_is_called_the_same_exists():
    for key in (key for row in rows_of(Same) for key in row.keys):
        assert fields(key), key


def test_what_is_dropped_is_no_field_of_ours():
    for key in (key for kind in (Off, Unread, Moved) for row in rows_of(kind) for key in row.keys):
        assert not fields(key), key


def test_what_is_moved_arrives_at_a_field():
    for row in rows_of(Moved):
        assert fields(row.treatment.to.replace("<role>", "actor_train")), row


def test_the_page_is_fresh():
    assert (ROOT / "docs" / "from_roll.md").read_text() == render_from_roll(), "run make docs"


def test_the_page_names_every_key():
    text = render_from_roll()
    assert all(f"`{sign}`" in text for sign in REQUIRED)
    assert all(any(f"`{sign}`" in text for sign in signs) for signs in PIPELINES.values())
    for row in ALL_ROWS:
        assert all(f"{key.rpartition('.')[2]}`" in text for key in row.keys), row
        assert row.treatment.describe().replace("|", "\\|") in text
