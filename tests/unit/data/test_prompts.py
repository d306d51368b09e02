"""Prompts read from data files, and batches drawn from them."""

from __future__ import annotations

import json
import os
from collections import Counter

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from roll_r3.config.workers import DataArgs
from roll_r3.data.prompts import read_prompts
from roll_r3.data.tiny_task import BUNDLED_TASKS
from roll_r3.errors import ConfigError
from roll_r3.models.tiny import byte_tokenizer
from roll_r3.pipelines.lifecycle.resume import data_of
from roll_r3.preflight.files import data_problems


@pytest.fixture(scope="module")
def tokenizer():
    return byte_tokenizer()


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_columns_are_mapped(tmp_path, tokenizer, kind):
    rows = [{"q": "1+1=", "a": 2, "topic": "sum", "nr": f"n{i}"} for i in range(3)]
    name = write_rows(tmp_path / "x.jsonl", rows)
    if kind == "parquet":
        name = str(tmp_path / "x.parquet")
        pq.write_table(pa.Table.from_pylist(rows), name)
    args = DataArgs(file_name=name, prompt="q", ground_truth="a", domain="topic", id="nr")
    prompts = read_prompts(args, tokenizer, 10)
    assert [p.prompt_id for p in prompts] == ["n0", "n1", "n2"]
    assert prompts[0].ground_truth == "2"
    assert prompts[0].domain == "sum"
    assert tokenizer.decode(prompts[0].token_ids) == "1+1="
    assert prompts[1].row == rows[1], "every column, as it is"
    assert prompts[1].messages == ({"role": "user", "content": "1+1="},)


@pytest.mark.parametrize("written", [list, json.dumps], ids=["list", "text"])
def test_messages_go_through_the_chat_template(tmp_path, tokenizer, written):
    messages = [{"role": "system", "content": "S"}, {"role": "user", "content": "U"}]
    rows = [{"messages": written(messages), "ground_truth": "g"}]
    args = DataArgs(file_name=write_rows(tmp_path / "m.jsonl", rows), messages="messages")
    assert tokenizer.decode(read_prompts(args, tokenizer, 10)[0].token_ids) == "SU"


@pytest.mark.parametrize("messages", ["hello", "{}", "[3]", '[{"role": "user"}]'])
def test_invalid_messages_name_the_line(tmp_path, tokenizer, messages):
    rows = [{"messages": messages, "ground_truth": "g"}]
    args = DataArgs(file_name=write_rows(tmp_path / "m.jsonl", rows), messages="messages")
    with pytest.raises(ConfigError, match=r"m\.jsonl line 1: (column \"messages\"|messages\[0\]) is "):
        read_prompts(args, tokenizer, 10)


def test_long_prompts_are_skipped_with_a_message(tmp_path, tokenizer):
    rows = [{"prompt": "x" * n, "ground_truth": ""} for n in (3, 30)]
    args = DataArgs(file_name=write_rows(tmp_path / "l.jsonl", rows))
    messages: list[str] = []
    assert len(read_prompts(args, tokenizer, 10, messages.append)) == 1
    assert messages == ["skipped 1 of 2 prompts longer than prompt_length (10 tokens)"]
    with pytest.raises(ConfigError, match=r"no prompt of at most prompt_length=2 tokens; the shortest of 2 has 3"):
        read_prompts(args, tokenizer, 2)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ({"file_name": "nowhere.jsonl"}, "No such file"),
        ({"file_name": "bundled:nothing"}, "there are bundled:addition_mod10"),
        ({"file_name": "data.csv"}, "not a file of a known format. Instead, name a readable .jsonl"),
        ({"file_name": "x" * 300 + ".jsonl"}, "File name too long"),
        ({"file_name": "nul\0.jsonl"}, "null byte"),
    ],
)
def test_missing_sources_are_named(tokenizer, args, message):
    with pytest.raises(ConfigError, match=message):
        read_prompts(DataArgs(**args), tokenizer, 10)


def test_blank_lines_are_skipped(tmp_path, tokenizer):
    (tmp_path / "b.jsonl").write_text('\n  \r\n{"prompt": "1", "ground_truth": "1"}\n\n')
    args = DataArgs(file_name=str(tmp_path / "b.jsonl"))
    assert len(read_prompts(args, tokenizer, 10)) == 1
    assert not list(data_problems(args)), "validation agrees"


def test_a_missing_column_lists_those_that_exist(tmp_path, tokenizer):
    name = write_rows(tmp_path / "c.jsonl", [{"question": "1", "ground_truth": "1"}])
    with pytest.raises(ConfigError, match='"prompt" is missing, there are "question", "ground_truth"'):
        read_prompts(DataArgs(file_name=name), tokenizer, 10)


def test_rows_that_do_not_fit_the_template_are_counted(tmp_path, tokenizer):
    rows = [{"prompt": text, "ground_truth": ""} for text in ("a", "", "b", "")]
    with pytest.raises(ConfigError, match=r"e\.jsonl line 2: the prompt is empty.*\(2 rows: lines 2, 4\)"):
        read_prompts(DataArgs(file_name=write_rows(tmp_path / "e.jsonl", rows)), tokenizer, 10)


def test_a_long_reading_reports_progress(tokenizer, monkeypatch):
    monkeypatch.setattr("roll_r3.data.prompts._LOG_INTERVAL_S", -1.0)
    messages: list[str] = []
    read_prompts(DataArgs(file_name="bundled:addition_mod10"), tokenizer, 10, messages.append)
    assert messages[42] == "tokenized 42 of 100 prompts"


@pytest.mark.parametrize(
    ("task", "sha256"),
    [
        ("addition_mod10", "c5dbc3232ec90742bcbb2e1d74986c4d730b8f3af86098d8dd154aee20ac554c"),
        ("copy_digits", "9b71cc6c10e96365af36d1fd5e9f2d12f84768d5c9b6fb45d47be5e1f4f0816e"),
    ],
)
def test_runs_on_bundled_tasks_resume_from_checkpoints_of_earlier_releases(tokenizer, task, sha256):
    assert data_of(read_prompts(DataArgs(file_name=f"bundled:{task}"), tokenizer, 100), 0).sha256 == sha256


def test_a_file_that_changed_under_an_old_time_is_other_data(tmp_path, tokenizer):
    path = tmp_path / "rows.jsonl"
    found = []
    for answer in ("1", "2"):
        write_rows(path, [{"prompt": "a", "ground_truth": answer}])
        os.utime(path, (1, 1))
        prompts = read_prompts(DataArgs(file_name=str(path)), tokenizer, 10)
        found.append((prompts[0].ground_truth, data_of(prompts, 0).sha256))
    assert [answer for answer, _ in found] == ["1", "2"]
    assert found[0][1] != found[1][1]


def test_bundled_tasks_are_right():
    assert ("3+9=", "2") in BUNDLED_TASKS["addition_mod10"]()
    assert ("copy 407:", "407") in BUNDLED_TASKS["copy_digits"]()
    assert ("7=", "7") in BUNDLED_TASKS["repeat_digit"]()


@pytest.mark.parametrize("domain", [None, "task"])
def test_bundled_tasks_are_domains_if_they_are_asked_for(tokenizer, domain):
    args = DataArgs(file_name=("bundled:repeat_digit", "bundled:addition_mod10"), domain=domain)
    found = Counter(prompt.domain for prompt in read_prompts(args, tokenizer, 20))
    assert found == ({"repeat_digit": 10, "addition_mod10": 100} if domain else {"default": 110})
