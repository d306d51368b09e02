"""Checkpoints, prompts and directories, examined without loading them."""

from __future__ import annotations

import errno
import json
import os
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from roll_r3.config.load import load_text
from roll_r3.config.rules.example import MINIMAL
from roll_r3.config.rules.paths import ENGINE
from roll_r3.config.workers import DataArgs
from roll_r3.data.sources import ReadLimit
from roll_r3.errors import ConfigError
from roll_r3.models.checkpoint_files import is_hub_name, resolve_checkpoint
from roll_r3.preflight.files import data_problems, output_problem
from roll_r3.preflight.model_files import Model, find_model, incomplete
from roll_r3.preflight.rules.files import RULES
from roll_r3.preflight.surroundings import Surroundings, read_surroundings
from roll_r3.preflight.versions import find_interpreter, versions_beside

TINY = {
    "model_type": "qwen3_moe",
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_experts": 16,
    "num_experts_per_tok": 2,
    "vocab_size": 260,
    "max_position_embeddings": 64,
}


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    (tmp_path / "config.json").write_text(json.dumps(TINY))
    (tmp_path / "tokenizer.json").write_text("{}")
    (tmp_path / "model.safetensors").touch()
    return tmp_path


def test_a_directory_is_read(checkpoint):
    model = find_model(str(checkpoint))
    assert isinstance(model, Model)
    assert model.facts is not None
    assert model.facts.num_experts == 16
    assert model.source == str(checkpoint / "config.json")
    assert incomplete(str(checkpoint)) == ""


@pytest.mark.parametrize("text", ["", "[]", "{", "3", '{"model_type": "qwen3_moe"}'])
def test_a_config_json_that_cannot_be_used_is_named_or_gives_no_facts(checkpoint, text):
    (checkpoint / "config.json").write_text(text)
    model = find_model(str(checkpoint))
    assert isinstance(model, str) or model.facts is None
    assert (model if isinstance(model, str) else model.reason) != ""


def test_names(tmp_path):
    assert "no such directory" in str(find_model("/not/here"))
    assert "no such directory" in str(find_model("not_here"))
    known = find_model("Qwen/Qwen3-30B-A3B")
    assert isinstance(known, Model)
    assert known.source == "the bundled table"
    assert find_model("someone/some-model") == ""
    assert [is_hub_name(name) for name in ("a/b", "a/b/c", "/a/b", "./a", "a", "../b")] == [True] + [False] * 5


def test_the_hubs_cache_is_read_without_a_download(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    snapshot = tmp_path / "models--someone--cached" / "snapshots" / "0123"
    snapshot.mkdir(parents=True)
    (snapshot.parents[1] / "refs").mkdir()
    (snapshot.parents[1] / "refs" / "main").write_text("0123")
    (snapshot / "config.json").write_text(json.dumps(TINY))
    before = set(sys.modules)
    model = find_model("someone/cached")
    assert isinstance(model, Model)
    assert model.facts is not None
    assert "huggingface_hub" not in set(sys.modules) - before
    (snapshot.parents[1] / "refs" / "main").write_text("4567")
    assert find_model("someone/cached") == ""


def test_missing_files_of_a_directory_are_named(checkpoint):
    (checkpoint / "model.safetensors").unlink()
    assert "no *.safetensors" in incomplete(str(checkpoint))
    index = checkpoint / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "one.safetensors", "b": "two.safetensors"}}))
    (checkpoint / "two.safetensors").touch()
    assert "lacks 1 of its weight files, for example one.safetensors" in incomplete(str(checkpoint))
    (checkpoint / "one.safetensors").touch()
    assert incomplete(str(checkpoint)) == ""
    index.write_text("{")
    assert "cannot be read" in incomplete(str(checkpoint))
    (checkpoint / "tokenizer.json").unlink()
    assert "no tokenizer" in incomplete(str(checkpoint))


@pytest.mark.parametrize(
    ("line", "columns", "message"),
    [
        (b'{"prompt": "a", "ground_truth": "b"}\n', {}, None),
        (b'{"q": "a", "ground_truth": "b"}\n', {}, 'column "prompt" is missing, there are "q", "ground_truth"'),
        (b'{"q": "a", "ground_truth": "b"}\n', {"prompt": "q"}, None),
        (b'{"m": [{"role": "user", "content": "a"}], "ground_truth": "b"}\n', {"messages": "m"}, None),
        (b'{"prompt": "a", "ground_truth": "b"}\n', {"domain": "tag"}, 'column "tag" is missing'),
        (b"", {}, "is empty"),
        (b"{", {}, "not JSON"),
        (b"\xff\xfe\n", {}, "not UTF-8"),
        (b"[" * 100_000, {}, "more than 100 levels"),
        (b"3\n", {}, "3 is not an object"),
        (b'\n \r\n{"prompt": "a", "ground_truth": "b"}\n', {}, None),
        (b'\n{"q": "a", "ground_truth": "b"}\n', {}, 'line 2: column "prompt" is missing'),
        (b"\n\n", {}, "is empty"),
    ],
)
def test_rows_of_prompts_are_read(tmp_path, line, columns, message):
    path = tmp_path / "prompts.jsonl"
    path.write_bytes(line)
    problems = list(data_problems(DataArgs(file_name=str(path), **columns)))
    assert len(problems) == (message is not None)
    assert message is None or message in problems[0]


def test_every_source_is_looked_at(tmp_path):
    names = ("bundled:addition_mod10", "bundled:nothing", "a.csv", str(tmp_path / "a.parquet"), str(tmp_path))
    problems = list(data_problems(DataArgs(file_name=names)))
    assert [problem.split(": ")[0] for problem in problems] == ["bundled:nothing", "a.csv", names[3], str(tmp_path)]
    assert "No such file" in problems[2]


def test_where_runs_are_written(tmp_path):
    assert output_problem(str(tmp_path / "new" / "deeper"), "demo") == ""
    (tmp_path / "file").touch()
    assert "not a directory" in output_problem(str(tmp_path / "file" / "runs"), "demo")
    assert f"{tmp_path / 'file'} is not a directory" in output_problem(str(tmp_path), "file")
    assert "too long" in output_problem(str(tmp_path), "x" * 300)
    assert list(tmp_path.iterdir()) == [tmp_path / "file"], "nothing is made"


def test_files_of_a_tokenizer(checkpoint):
    tokenizer = checkpoint / "tokenizer.json"
    tokenizer.write_text("")
    assert f"{tokenizer} is empty" in incomplete(str(checkpoint))
    tokenizer.unlink()
    for name in ("tokenizer_config.json", "tiktoken.model", "tokenizer.model", "vocab.json"):
        assert "no tokenizer" in incomplete(str(checkpoint))
        (checkpoint / name).write_text("{}")
        assert incomplete(str(checkpoint)) == ""
        (checkpoint / name).unlink()


def test_a_damaged_parquet_file_is_named(tmp_path):
    path = tmp_path / "a.parquet"
    for content in (b"PAR1....PAR1", b'{"prompt": 1}', b""):
        path.write_bytes(content)
        [problem] = data_problems(DataArgs(file_name=str(path)))
        assert problem.startswith(f"{path}: cannot be read")


def test_the_columns_of_a_parquet_file_are_looked_for(tmp_path):
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"prompt": ["a", "b"], "answer": ["1", "2"]}), path)
    assert not list(data_problems(DataArgs(file_name=str(path), ground_truth="answer")))
    [problem] = data_problems(DataArgs(file_name=str(path)))
    assert 'row 1: column "ground_truth" is missing' in problem
    assert "(2 rows: rows 1, 2)" in problem


SOUND = b'{"prompt": "a", "ground_truth": "b"}\n'


@pytest.mark.parametrize("at", [30, 900], ids=["beginning", "end"])
def test_a_large_file_is_read_at_both_ends(tmp_path, monkeypatch, at):
    monkeypatch.setattr("roll_r3.data.row_reader.VALIDATION_LIMIT", ReadLimit(200, 1 << 20))
    monkeypatch.setattr("roll_r3.data.json_files._TAIL", len(SOUND) * 150)
    lines = [SOUND] * 1000
    path = tmp_path / "large.jsonl"
    path.write_bytes(b"".join(lines))
    assert not list(data_problems(DataArgs(file_name=str(path))))
    lines[500] = b"{\n"
    path.write_bytes(b"".join(lines))
    assert not list(data_problems(DataArgs(file_name=str(path)))), "the middle is not read"
    lines[at] = b'{"prompt": "a"}\n'
    path.write_bytes(b"".join(lines))
    [problem] = data_problems(DataArgs(file_name=str(path)))
    assert ("line 31:" if at == 30 else "line 100 from the end:") in problem
    path.write_bytes(b"".join(lines)[:-5])
    assert "line 1 from the end: not JSON" in list(data_problems(DataArgs(file_name=str(path))))[-1]


def test_row_groups_of_a_large_parquet_file_are_sampled(tmp_path, monkeypatch):
    monkeypatch.setattr("roll_r3.data.row_reader.VALIDATION_LIMIT", ReadLimit(200, 1 << 20))
    path = tmp_path / "large.parquet"
    answers = ["1"] * 2000
    pq.write_table(pa.table({"prompt": answers, "ground_truth": answers}), path, row_group_size=250)
    assert not list(data_problems(DataArgs(file_name=str(path))))
    pq.write_table(pa.table({"prompt": answers, "ground_truth": [*answers[:1750], None, *answers[1751:]]}), path,
                   row_group_size=250)  # fmt: skip
    [problem] = data_problems(DataArgs(file_name=str(path)))
    assert 'row 1751: column "ground_truth" is null' in problem


def test_a_large_json_file_is_read_at_its_ends(tmp_path, monkeypatch):
    monkeypatch.setattr("roll_r3.data.row_reader.VALIDATION_LIMIT", ReadLimit(200, 1000))
    monkeypatch.setattr("roll_r3.data.row_reader._FILE_MINIMUM", ReadLimit(1, 1))
    path = tmp_path / "large.json"
    rows = b"[" + b",".join([SOUND] * 1000) + b"]"
    for content, expected in ((rows, None), (rows[:-1], "truncated"), (b"{" + rows, "not a list")):
        path.write_bytes(content)
        problems = list(data_problems(DataArgs(file_name=str(path))))
        assert len(problems) == (expected is not None)
        assert expected is None or expected in problems[0]


def test_a_pipe_is_not_waited_for(checkpoint):
    for name in ("config.json", "prompts.jsonl"):
        (checkpoint / name).unlink(missing_ok=True)
        os.mkfifo(checkpoint / name)
    assert "a pipe" in str(find_model(str(checkpoint)))
    assert "a pipe" in next(data_problems(DataArgs(file_name=str(checkpoint / "prompts.jsonl"))))
    (checkpoint / "model.safetensors.index.json").symlink_to("/dev/zero")
    assert incomplete(str(checkpoint)) == "", "an index must be a file"


ODD = ["x" * 300, "a/" + "x" * 300, "nul\0", "a/nul\0", "/nul\0/x", "x" * 5000]


@pytest.mark.parametrize("name", ODD)
def test_odd_paths_are_named_and_raise_nothing(name):
    assert find_model(name)
    assert incomplete(name) == ""
    assert len(list(data_problems(DataArgs(file_name=f"{name}.jsonl")))) == 1
    assert find_interpreter(name) is None
    with pytest.raises(ConfigError, match="checkpoint"):
        resolve_checkpoint(name)
    assert output_problem(name, "demo") or name.startswith("a/x"), "a missing parent directory"
    loaded = load_text(MINIMAL, "run.yaml").config
    model = loaded.model_copy(update={"pretrain": name, "output_dir": name})
    assert name in read_surroundings(model).checkpoint_problems


def test_unreadable_paths_are_named(checkpoint, monkeypatch):
    real = os.stat

    def stat(path, *args, **kwargs):
        if str(path).startswith(str(checkpoint)):
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return real(path, *args, **kwargs)

    monkeypatch.setattr(os, "stat", stat)
    name = str(checkpoint / "model")
    assert "Permission denied" in str(find_model(name))
    assert "Permission denied" in next(data_problems(DataArgs(file_name=f"{name}.jsonl")))
    assert "Permission denied" in output_problem(name, "demo")
    assert versions_beside(Path(name) / "bin" / "python", "no-such-package") == {}
    with pytest.raises(ConfigError):
        resolve_checkpoint(name)


def test_a_directory_that_may_not_be_listed_lacks_everything(checkpoint, monkeypatch):
    def glob(path, pattern):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(Path, "glob", glob)
    assert "no tokenizer" in incomplete(str(checkpoint))


def test_no_rule_looks_at_the_disk_by_itself(monkeypatch):
    config = load_text(MINIMAL, "run.yaml", [f"{ENGINE}.python=/no/such/python"]).config
    rule = next(rule for rule in RULES if rule.id == "engine-python-exists")
    assert not list(rule.check(config, Surroundings(versions={"sglang": None})))
    assert list(rule.check(config, Surroundings(engine_python_missing=True)))
