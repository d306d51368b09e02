"""Domains of data files against the reward rules, before anything starts."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from roll_r3.config.rewards import RewardConfig
from roll_r3.config.workers import DataArgs
from roll_r3.preflight import domains
from roll_r3.preflight.domains import domains_without_rule

NAMED = {"a": RewardConfig(reward="math", tag_included=("x", "7"))}
REST = {"b": RewardConfig(reward="math")}


def rows(path: Path, *tags: object) -> Path:
    path.write_text("".join(json.dumps({"prompt": "p", "tag": tag}) + "\n\n" for tag in tags))
    return path


def found(path: Path, rewards: dict[str, RewardConfig], column: str | None = "tag") -> list[str]:
    return list(domains_without_rule(DataArgs(file_name=(str(path), "bundled:x"), domain=column), rewards))


def test_rows_of_a_domain_that_no_rule_scores_are_named(tmp_path: Path) -> None:
    path = rows(tmp_path / "a.jsonl", "x", "code", 7, "judge")
    assert found(path, NAMED) == [f"{path} has rows of code, judge"]
    assert found(path, NAMED | REST) == [], "one rule takes the rest"
    assert found(path, NAMED, column=None) == [], "without a column there are no domains"
    assert found(rows(tmp_path / "b.jsonl", "x", 7), NAMED) == []


@pytest.mark.parametrize("content", ["", "not json\n", "[1]\n", '{"tag": ["x"]}\n' * 0])
def test_unreadable_files_are_left_to_other_rules(tmp_path: Path, content: str) -> None:
    (tmp_path / "a.jsonl").write_text(content)
    assert found(tmp_path / "a.jsonl", NAMED) == []
    assert found(tmp_path / "missing.jsonl", NAMED) == []


def test_only_whole_rows_at_the_start_are_looked_at(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = rows(tmp_path / "a.jsonl", "x", "code", "judge")
    monkeypatch.setattr(domains, "_LOOKED_AT", path.stat().st_size - 10)
    assert found(path, NAMED) == [f"{path} has rows of code"]
