"""What is found of checkpoints, prompts, reward functions and engines without loading or running any of them."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from roll_r3.config.pipeline import RewardConfig
from roll_r3.config.workers import DataArgs
from roll_r3.models.checkpoint import is_hub_name
from roll_r3.preflight.checkpoints import Model, find_model, incomplete
from roll_r3.preflight.files import data_problems, output_problem, reward_problems
from roll_r3.preflight.versions import _installed_for

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
    (tmp_path / "tokenizer.json").touch()
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
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    snapshot = tmp_path / "models--someone--cached" / "snapshots" / "0123"
    snapshot.mkdir(parents=True)
    (snapshot.parents[1] / "refs").mkdir()
    (snapshot.parents[1] / "refs" / "main").write_text("0123")
    (snapshot / "config.json").write_text(json.dumps(TINY))
    model = find_model("someone/cached")
    assert isinstance(model, Model)
    assert model.facts is not None


def test_what_a_directory_lacks_is_named(checkpoint):
    (checkpoint / "model.safetensors").unlink()
    assert "no *.safetensors" in incomplete(str(checkpoint))
    index = checkpoint / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "one.safetensors", "b": "two.safetensors"}}))
    (checkpoint / "two.safetensors").touch()
    assert "lacks 1 of its weight files, one.safetensors" in incomplete(str(checkpoint))
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
        (b'{"q": "a", "ground_truth": "b"}\n', {}, "no column prompt; it has q, ground_truth"),
        (b'{"q": "a", "ground_truth": "b"}\n', {"prompt": "q"}, None),
        (b'{"m": [], "ground_truth": "b"}\n', {"messages": "m"}, None),
        (b'{"prompt": "a", "ground_truth": "b"}\n', {"domain": "tag", "id": "id"}, "no column tag, id"),
        (b"", {}, "is empty"),
        (b"{", {}, "is not JSON"),
        (b"\xff\xfe\n", {}, "is not JSON"),
        (b"[" * 100_000, {}, "is not JSON"),
        (b"3\n", {}, "not a JSON object"),
    ],
)
def test_the_first_row_of_prompts_is_read(tmp_path, line, columns, message):
    path = tmp_path / "prompts.jsonl"
    path.write_bytes(line)
    problems = list(data_problems(DataArgs(file_name=str(path), **columns)))
    assert len(problems) == (message is not None)
    assert message is None or message in problems[0]


def test_every_source_is_looked_at(tmp_path):
    names = ("bundled:addition_mod10", "bundled:nothing", "a.csv", str(tmp_path / "a.parquet"), str(tmp_path))
    problems = list(data_problems(DataArgs(file_name=names)))
    assert [problem.split()[0] for problem in problems] == ["bundled:nothing", "a.csv", names[3], str(tmp_path)]
    assert "No such file" in problems[2]


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package on the import path that must never be imported."""
    folder = tmp_path / "some_rewards"
    folder.mkdir()
    (folder / "__init__.py").write_text("raise SystemExit('it was run')\n")
    (folder / "rules.py").write_text(
        "raise SystemExit('it was run')\n"
        "def score(response, truth): ...\n"
        "alias = score\n"
        "from math import sqrt as root\n"
    )
    (folder / "broken.py").write_text("def (\n")
    (folder / "star.py").write_text("from os.path import *\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    return folder


@pytest.mark.parametrize(
    ("reward", "message"),
    [
        ("some_rewards.rules:score", None),
        ("some_rewards.rules:alias", None),
        ("some_rewards.rules:root", None),
        ("some_rewards.rules:scores", "defines no scores"),
        ("some_rewards.nothing:score", "no module some_rewards.nothing"),
        ("some_rewards.rules.deeper:score", "no module some_rewards.rules.deeper"),
        ("no_such_rewards:score", "no module no_such_rewards"),
        ("some_rewards.broken:score", "cannot be read"),
        ("some_rewards.star:join", None),
        ("math:sqrt", None),
        ("roll_r3.rewards.rules:exact_match", None),
        ("exact_match", None),
        ("not a function", None),
    ],
)
def test_a_reward_function_is_found_without_being_imported(package, reward, message):
    problems = list(reward_problems({"mine": RewardConfig(reward=reward)}))
    assert len(problems) == (message is not None)
    assert message is None or message in problems[0]
    assert not any(name.startswith("some_rewards") for name in sys.modules)


def test_where_runs_are_written(tmp_path):
    assert output_problem(str(tmp_path / "new" / "deeper")) == ""
    (tmp_path / "file").touch()
    assert "not a directory" in output_problem(str(tmp_path / "file" / "runs"))
    assert list(tmp_path.iterdir()) == [tmp_path / "file"], "nothing is made"


def test_the_release_beside_another_interpreter(tmp_path):
    site = tmp_path / "lib" / "python3.12" / "site-packages"
    (site / "sglang-0.5.1.dist-info").mkdir(parents=True)
    (site / "sglang-0.5.1.dist-info" / "METADATA").write_text("Name: sglang\nVersion: 0.5.1\n")
    python = tmp_path / "bin" / "python"
    assert _installed_for(python, "sglang") == "0.5.1"
    assert _installed_for(python, "megatron-core") is None
