"""Sets of an evaluation."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from roll_r3.config.workers import DataArgs
from roll_r3.data.evaluation_sets import read_evaluation_sets, set_names
from roll_r3.data.tiny_task import addition_mod10, addition_mod10_test, addition_mod10_train
from roll_r3.errors import ConfigError
from roll_r3.models.tiny import byte_tokenizer


def test_each_file_is_a_set_with_a_name_of_its_own(tmp_path: Path) -> None:
    for folder, prompts in (("a", ["1", "22"]), ("b", ["3", "4" * 20])):
        (tmp_path / folder).mkdir()
        rows = [json.dumps({"prompt": prompt, "ground_truth": "x"}) for prompt in prompts]
        (tmp_path / folder / "aime.jsonl").write_text("\n".join(rows))
    said: list[str] = []
    names = (str(tmp_path / "*" / "aime.jsonl"), "bundled:copy_digits")
    sets = read_evaluation_sets(DataArgs(file_name=names), byte_tokenizer(), 16, said.append)
    assert [(one.name, len(one.prompts)) for one in sets] == [("aime", 2), ("aime-2", 1), ("copy_digits", 1000)]
    assert said == ["evaluation set aime-2: skipped 1 of 2 prompts longer than prompt_length (16 tokens)"]


def test_names_stay_different() -> None:
    assert set_names(["a.jsonl", "b/a.json", "a-2.jsonl", "c/a.parquet"]) == ["a", "a-2", "a-2-2", "a-3"]


def test_faults_name_the_section(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"prompt": "x"}\n')
    for name in ("no_such.jsonl", str(tmp_path / "a.jsonl")):
        with pytest.raises(ConfigError, match=r"^validation\.data_args: the data cannot be used"):
            read_evaluation_sets(DataArgs(file_name=name), byte_tokenizer(), 16)


def test_held_out_sums_are_a_fifth_of_every_row_and_column() -> None:
    train, test = addition_mod10_train(), addition_mod10_test()
    assert sorted(train + test) == sorted(addition_mod10())
    assert [sum(prompt.startswith(f"{a}+") for prompt, _ in test) for a in range(10)] == [2] * 10
    assert [sum(prompt.endswith(f"+{b}=") for prompt, _ in test) for b in range(10)] == [2] * 10
