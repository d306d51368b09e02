"""What is found of checkpoints, prompts, reward functions and engines without loading or running any of them."""

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
from roll_r3.config.pipeline import RewardConfig
from roll_r3.config.rules.example import MINIMAL
from roll_r3.config.rules.paths import ENGINE
from roll_r3.config.workers import DataArgs
from roll_r3.data.sources import ReadLimit
from roll_r3.errors import ConfigError
from roll_r3.models.checkpoint import is_hub_name, resolve_checkpoint
from roll_r3.preflight import files
from roll_r3.preflight.checkpoints import Model, find_model, incomplete
from roll_r3.preflight.files import data_problems, output_problem, reward_problems
from roll_r3.preflight.rules.files import RULES
from roll_r3.preflight.surroundings import Surroundings, look_around
from roll_r3.preflight.versions import find_interpreter, find_versions, installed_for, is_isolated

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
        "if root:\n    def branch(response, truth): ...\n"
        "try:\n    pass\nexcept ImportError:\n    pass\nelse:\n    def tried(response, truth): ...\n"
        "with open('x') as opened:\n    def within(response, truth): ...\n"
        "match root:\n    case 1:\n        matched = 1\n"
        "def outer(response, truth):\n    def inner(response, truth): ...\n"
        "class Holder:\n    def method(self, truth): ...\n    field = 1\n"
        "squares = [number for number in range(3)]\n"
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
        ("some_rewards.rules:branch", None),
        ("some_rewards.rules:tried", None),
        ("some_rewards.rules:opened", None),
        ("some_rewards.rules:within", None),
        ("some_rewards.rules:matched", None),
        ("some_rewards.rules:Holder", None),
        ("some_rewards.rules:inner", "defines no inner"),
        ("some_rewards.rules:method", "defines no method"),
        ("some_rewards.rules:field", "defines no field"),
        ("some_rewards.rules:number", "defines no number"),
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


@pytest.mark.parametrize("made", [(), ("outer",), ("outer", "outer/inner")])
def test_folders_without_init_are_packages(made, monkeypatch, tmp_path):
    folder = tmp_path / "outer" / "inner"
    folder.mkdir(parents=True)
    for name in made:
        (tmp_path / name / "__init__.py").touch()
    (folder / "rules.py").write_text("def score(response, truth): ...\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    names = {"there": "outer.inner.rules:score", "lacking": "outer.inner.nothing:score"}
    problems = list(reward_problems({name: RewardConfig(reward=reward) for name, reward in names.items()}))
    assert len(problems) == 1
    assert "no module outer.inner.nothing" in problems[0]
    assert "outer" not in sys.modules


def test_where_runs_are_written(tmp_path):
    assert output_problem(str(tmp_path / "new" / "deeper"), "demo") == ""
    (tmp_path / "file").touch()
    assert "not a directory" in output_problem(str(tmp_path / "file" / "runs"), "demo")
    assert f"{tmp_path / 'file'} is not a directory" in output_problem(str(tmp_path), "file")
    assert "too long" in output_problem(str(tmp_path), "x" * 300)
    assert list(tmp_path.iterdir()) == [tmp_path / "file"], "nothing is made"


@pytest.mark.parametrize(
    ("parameters", "kwargs", "message"),
    [
        ("response, truth", {}, None),
        ("response, truth", {"letter": "a"}, "kwargs.letter: the function has no parameter of this name"),
        ("response", {}, None),
        ("response, row, messages", {}, None),
        ("response, row", {"row": 1}, "kwargs.row: the name is reserved for an offered value"),
        ("response, truth, letter", {}, "its parameter 'letter' has no default"),
        ("response, truth, letter", {"letter": "a"}, None),
        ("response, truth, letter='a'", {}, None),
        ("response, truth, letter, other='a'", {"other": "b"}, "its parameter 'letter' has no default"),
        ("response, truth, *, letter", {}, "its parameter 'letter' has no default"),
        ("response, truth, *, letter=None", {}, None),
        ("*args, **kwargs", {"letter": "a"}, None),
        ("response, truth, /, **kwargs", {"truth": "a"}, None),
        ("response, truth, **kwargs", {"truth": "a"}, None),
    ],
)
def test_a_reward_function_takes_what_it_is_given(package, parameters, kwargs, message):
    (package / "own.py").write_text(f"def score({parameters}): ...\n")
    problems = list(reward_problems({"mine": RewardConfig(reward="some_rewards.own:score", kwargs=kwargs)}))
    assert len(problems) == (message is not None)
    assert message is None or message in problems[0]


def test_what_only_an_import_could_tell_of_a_function_is_not_guessed(package):
    (package / "own.py").write_text(
        "@given\ndef decorated(): ...\nif 1:\n    def twice(response, truth): ...\nelse:\n    def twice(): ...\n"
    )
    names = ("decorated", "twice")
    assert not list(reward_problems({name: RewardConfig(reward=f"some_rewards.own:{name}") for name in names}))


def test_the_built_in_rewards(monkeypatch):
    for name in ("exact_match", "math"):
        [problem] = reward_problems({"mine": RewardConfig(reward=name, kwargs={"letter": "a"})})
        assert problem == f"{name}: it takes no kwargs, letter among them"
    monkeypatch.setattr(files, "distributions", lambda name: [name] if name == "math-verify" else [])
    assert not list(reward_problems({"mine": RewardConfig(reward="math")}))
    monkeypatch.setattr(files, "distributions", lambda name: [])
    assert "math-verify" in next(reward_problems({"mine": RewardConfig(reward="math")}))
    assert not list(reward_problems({"mine": RewardConfig(reward="exact_match")}))


def test_what_a_tokenizer_is_made_from(checkpoint):
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
    monkeypatch.setattr("roll_r3.data.rows.VALIDATION_LIMIT", ReadLimit(200, 1 << 20))
    monkeypatch.setattr("roll_r3.data.json_files._TAIL", len(SOUND) * 150)
    lines = [SOUND] * 1000
    path = tmp_path / "large.jsonl"
    path.write_bytes(b"".join(lines))
    assert not list(data_problems(DataArgs(file_name=str(path))))
    lines[500] = b"{\n"
    path.write_bytes(b"".join(lines))
    assert not list(data_problems(DataArgs(file_name=str(path)))), "of the middle nothing is known"
    lines[at] = b'{"prompt": "a"}\n'
    path.write_bytes(b"".join(lines))
    [problem] = data_problems(DataArgs(file_name=str(path)))
    assert ("line 31:" if at == 30 else "line 100 from the end:") in problem
    path.write_bytes(b"".join(lines)[:-5])
    assert "line 1 from the end: not JSON" in list(data_problems(DataArgs(file_name=str(path))))[-1]


def test_row_groups_of_a_large_parquet_file_are_sampled(tmp_path, monkeypatch):
    monkeypatch.setattr("roll_r3.data.rows.VALIDATION_LIMIT", ReadLimit(200, 1 << 20))
    path = tmp_path / "large.parquet"
    answers = ["1"] * 2000
    pq.write_table(pa.table({"prompt": answers, "ground_truth": answers}), path, row_group_size=250)
    assert not list(data_problems(DataArgs(file_name=str(path))))
    pq.write_table(pa.table({"prompt": answers, "ground_truth": [*answers[:1750], None, *answers[1751:]]}), path,
                   row_group_size=250)  # fmt: skip
    [problem] = data_problems(DataArgs(file_name=str(path)))
    assert 'row 1751: column "ground_truth" is null' in problem


def test_a_large_json_file_is_read_at_its_ends(tmp_path, monkeypatch):
    monkeypatch.setattr("roll_r3.data.rows.VALIDATION_LIMIT", ReadLimit(200, 1000))
    monkeypatch.setattr("roll_r3.data.rows._FILE_MINIMUM", ReadLimit(1, 1))
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
    assert incomplete(str(checkpoint)) == "", "an index that is no file is none"


ODD = ["x" * 300, "a/" + "x" * 300, "nul\0", "a/nul\0", "/nul\0/x", "x" * 5000]


@pytest.mark.parametrize("name", ODD)
def test_odd_paths_are_named_and_raise_nothing(name):
    assert find_model(name)
    assert incomplete(name) == ""
    assert len(list(data_problems(DataArgs(file_name=f"{name}.jsonl")))) == 1
    assert find_interpreter(name) is None
    with pytest.raises(ConfigError, match="checkpoint"):
        resolve_checkpoint(name)
    assert output_problem(name, "demo") or name.startswith("a/x"), "nothing is known of what is below nothing"
    loaded = load_text(MINIMAL, "run.yaml").config
    model = loaded.model_copy(update={"pretrain": name, "output_dir": name})
    assert name in look_around(model).checkpoint_problems


def test_what_may_not_be_looked_at_is_named(checkpoint, monkeypatch):
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
    assert installed_for(Path(name) / "bin" / "python", "no-such-package") is None
    with pytest.raises(ConfigError):
        resolve_checkpoint(name)


def test_a_directory_that_may_not_be_listed_lacks_everything(checkpoint, monkeypatch):
    def glob(path, pattern):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(Path, "glob", glob)
    assert "no tokenizer" in incomplete(str(checkpoint))


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A root directory with nothing of this machine in it."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.delenv("PYTHONPATH", raising=False)
    return tmp_path


def interpreter(folder: Path, settings: str | None = None) -> Path:
    python = folder / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text("#!/bin/sh\n")
    python.chmod(0o755)
    if settings is not None:
        (folder / "pyvenv.cfg").write_text(settings)
    return python


def install(folder: Path, release: str, package: str = "sglang") -> None:
    info = folder / f"{package}-{release}.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Name: {package}\nVersion: {release}\n")


@pytest.mark.parametrize(
    "folder",
    [
        "usr/lib/python3.12/site-packages",
        "usr/lib/python3/dist-packages",
        "usr/local/lib/python3.12/dist-packages",
        "home/.local/lib/python3.12/site-packages",
    ],
)
def test_the_release_beside_another_interpreter(machine, folder):
    python = interpreter(machine / "usr")
    assert installed_for(python, "sglang") is None
    assert not is_isolated(python)
    install(machine / folder, "0.5.1")
    assert installed_for(python, "sglang") == "0.5.1"
    assert installed_for(python, "megatron-core") is None


def test_an_environment_sees_the_systems_packages_where_it_says_so(machine, monkeypatch):
    interpreter(machine / "usr")
    install(machine / "usr/lib/python3/dist-packages", "0.5.1")
    closed = interpreter(machine / "closed", f"home = {machine}/usr/bin\ninclude-system-site-packages = false\n")
    opened = interpreter(machine / "opened", f"home = {machine}/usr/bin\ninclude-system-site-packages = true\n")
    assert (installed_for(closed, "sglang"), is_isolated(closed)) == (None, True)
    assert (installed_for(opened, "sglang"), is_isolated(opened)) == ("0.5.1", False)
    install(machine / "opened/lib/python3.12/site-packages", "0.5.2")
    assert installed_for(opened, "sglang") == "0.5.2", "its own come first"
    install(machine / "named", "0.5.3")
    path = str(machine / "named")
    assert (installed_for(closed, "sglang", path), is_isolated(closed, path)) == ("0.5.3", False)


def test_an_engine_is_found_on_the_path_that_its_server_starts_with(machine, monkeypatch):
    """A vLLM server does not inherit PYTHONPATH."""
    python = interpreter(machine / "closed", "include-system-site-packages = false\n")
    install(machine / "named", "0.5.3")
    install(machine / "named", "0.32.0", "vllm")
    monkeypatch.setenv("PYTHONPATH", str(machine / "named"))
    for engine, release in (("sglang", "0.5.3"), ("vllm", None)):
        chosen = f"actor_infer.strategy_args={{strategy_name: {engine}, strategy_config: {{python: {python}}}}}"
        assert find_versions(load_text(MINIMAL, "run.yaml", [chosen]).config)[engine] == release


def test_nothing_is_claimed_of_an_interpreter_whose_packages_are_not_found(machine, monkeypatch):
    def versions(python: str) -> dict[str, str | None]:
        return find_versions(load_text(MINIMAL, "run.yaml", [f"{ENGINE}.python={python}"]).config)

    system = interpreter(machine / "usr")
    assert "sglang" not in versions(str(system))
    assert versions(str(interpreter(machine / "closed", "home = /usr/bin\n")))["sglang"] is None
    assert "sglang" not in versions("no-such-python")
    install(machine / "usr/lib/python3/dist-packages", "0.5.1")
    monkeypatch.setenv("PATH", str(system.parent))
    assert versions("python")["sglang"] == "0.5.1", "a name on PATH"


def test_the_interpreter_is_looked_for_as_it_will_be_started(machine, monkeypatch):
    python = interpreter(machine / "usr")
    monkeypatch.setenv("PATH", str(python.parent))
    assert find_interpreter("python") == find_interpreter(str(python)) == python
    assert find_interpreter("pythons") is None
    python.chmod(0o644)
    assert find_interpreter(str(python)) is None
    config = load_text(MINIMAL, "run.yaml", [f"{ENGINE}.python=python"]).config
    assert look_around(config).engine_python_missing
    python.chmod(0o755)
    assert not look_around(config).engine_python_missing


def test_no_rule_looks_at_the_disk_by_itself(monkeypatch):
    config = load_text(MINIMAL, "run.yaml", [f"{ENGINE}.python=/no/such/python"]).config
    rule = next(rule for rule in RULES if rule.id == "engine-python-exists")
    assert not list(rule.check(config, Surroundings(versions={"sglang": None})))
    assert list(rule.check(config, Surroundings(engine_python_missing=True)))
