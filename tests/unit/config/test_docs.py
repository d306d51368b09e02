"""docs/configuration.md is what the models say."""

from __future__ import annotations

from pathlib import Path

import pytest

from roll_r3.config import docs
from roll_r3.config.explain import fields_at

PAGE = Path(__file__).parents[3] / "docs" / "configuration.md"


def test_the_page_is_fresh():
    assert docs.main(["--check", str(PAGE)]) == 0


def test_a_stale_page_is_noticed(tmp_path, capsys):
    page = tmp_path / "configuration.md"
    assert docs.main(["--check", str(page)]) == 1
    assert docs.main([str(page)]) == 0
    assert docs.main(["--check", str(page)]) == 0
    page.write_text(page.read_text() + "x")
    assert docs.main(["--check", str(page)]) == 1
    assert "out of date" in capsys.readouterr().err


@pytest.mark.parametrize("section", ["", "actor_train", "actor_train.training_args", "actor_infer.strategy_args"])
def test_every_field_is_described(section):
    page = docs.render_docs()
    for name in fields_at(section):
        rows = [row for row in page.splitlines() if row.startswith(f"| `{name}` |")]
        assert rows
        assert all(row.count(" | ") == 3 and row.split(" | ")[3].strip("| ") for row in rows)
