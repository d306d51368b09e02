"""Key tables, and the page generated from them."""

from __future__ import annotations

from collections import Counter

import pytest

from roll_r3.config.findings.report import ABSENT
from roll_r3.config.reading.field_paths import annotations_at
from roll_r3.from_roll.key_rows import Renamed, Row, Same, Unread, Unsupported
from roll_r3.from_roll.page import render_from_roll
from roll_r3.from_roll.pipelines import PIPELINES
from roll_r3.from_roll.signs import REQUIRED
from roll_r3.from_roll.tables import ALL_ROWS
from tests.unit.from_roll.cases import KEYS, ROOT, at, concrete, for_pattern, of_roll, put, run


def test_no_key_is_listed_twice():
    times = Counter(key for row in ALL_ROWS for key in row.keys)
    assert [key for key in times if times[key] > 1] == []


def fields(pattern: str) -> list[str]:
    """Return the fields of roll_r3 matched by a pattern."""
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
    for key in (key for kind in (Unsupported, Unread, Renamed) for row in rows_of(kind) for key in row.keys):
        assert not fields(key), key


def test_what_is_moved_arrives_at_a_field():
    for row in rows_of(Renamed):
        assert fields(row.treatment.to.replace("<role>", "actor_train")), row


def test_the_page_is_fresh():
    assert (ROOT / "docs" / "from_roll.md").read_text() == render_from_roll(), "run make docs"


def test_the_page_names_every_key():
    text = render_from_roll()
    assert all(f"`{sign}`" in text for sign in REQUIRED)
    assert all(any(f"`{sign}`" in text for sign in signs) for signs in PIPELINES.values())
    for row in ALL_ROWS:
        assert all(f"{key.rpartition('.')[2]}`" in text for key in row.keys), row
        assert row.treatment.describe() in text or row.treatment == Same()
