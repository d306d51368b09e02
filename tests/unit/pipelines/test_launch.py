"""Launch before there is a cluster."""

from __future__ import annotations

import json
from io import StringIO
from unittest.mock import MagicMock

import pytest

from roll_r3.config.load import load_text
from roll_r3.config.pipeline import RLVRConfig
from roll_r3.config.rules.example import MINIMAL
from roll_r3.models.tiny import byte_tokenizer, make_tiny_checkpoint
from roll_r3.pipelines.lifecycle.launch import _prepare, _prepare_evaluation, with_absolute_paths
from roll_r3.tracking.progress import Progress


def test_checkpoint_directories_become_absolute_and_hub_names_stay(tmp_path, monkeypatch):
    (tmp_path / "mine").mkdir()
    monkeypatch.chdir(tmp_path)
    config = RLVRConfig(
        exp_name="x",
        pretrain="owner/model",
        actor_train={"model_args": {"model_name_or_path": "mine"}},
        actor_infer={},
    )
    launched = with_absolute_paths(config)
    assert launched.pretrain == "owner/model"
    assert launched.actor_train.model_args.model_name_or_path == str(tmp_path / "mine")
    assert launched.actor_train.training_args == config.actor_train.training_args


@pytest.mark.parametrize("name", ["sglang", "vllm"])
def test_an_engines_interpreter_becomes_absolute_where_it_is_a_file(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)

    def launched(python: str) -> RLVRConfig:
        engine = {"strategy_name": name, "strategy_config": {"python": python, "tp_size": 2}}
        infer = {"strategy_args": engine, "model_args": {"model_name_or_path": "."}}
        return with_absolute_paths(RLVRConfig(exp_name="x", pretrain="x", actor_train={}, actor_infer=infer))

    (tmp_path / "bin").mkdir()
    (tmp_path / "python3").touch()
    (tmp_path / "bin" / "python").symlink_to(tmp_path / "python3")
    infer = launched("bin/python").actor_infer
    assert infer.strategy_args.strategy_config.python == str(tmp_path / "bin" / "python"), "the link, not its target"
    assert infer.strategy_args.strategy_config.tp_size == 2
    assert infer.model_args.model_name_or_path == str(tmp_path)
    for other in ("no/such/python", "python3"):  # refused by the check, and found by PATH
        assert launched(other).actor_infer.strategy_args.strategy_config.python == other


def test_the_terminal_is_told_of_prompts_that_are_left_out(tmp_path, caplog):
    make_tiny_checkpoint(tmp_path / "model")
    rows = [{"prompt": "x" * n, "ground_truth": ""} for n in (3, 30, 40)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    loaded = load_text(
        MINIMAL,
        "run.yaml",
        [
            f"pretrain={tmp_path / 'model'}",
            f"actor_train.data_args.file_name={tmp_path / 'rows.jsonl'}",
            f"output_dir={tmp_path}",
            "prompt_length=10",
            "response_length=64",
            "actor_infer.strategy_args.strategy_name=hf_infer",
        ],
    )
    terminal, rewards = StringIO(), MagicMock()
    rewards.shares.return_value = "which rule scores what"
    caplog.set_level("INFO")
    _, prompts = _prepare(loaded.config, loaded.origins, rewards, Progress(1, terminal))
    assert len(prompts) == 1
    said = "skipped 2 of 3 prompts longer than prompt_length (10 tokens)"
    assert said in terminal.getvalue()
    assert said in caplog.text


def test_rules_that_read_rows_can_check_those_of_an_evaluation(tmp_path):
    row = {"prompt": "x", "ground_truth": "", "test_cases": ["assert f() == 1"]}
    (tmp_path / "rows.jsonl").write_text(json.dumps(row))
    config = load_text(MINIMAL, "run.yaml", [f"validation.data_args.file_name={tmp_path / 'rows.jsonl'}"]).config
    rewards, checked = MagicMock(), []
    rewards.check_truths.side_effect = checked.extend
    _prepare_evaluation(config, byte_tokenizer(), rewards, Progress(1, StringIO()))
    assert [truth.row for truth in checked] == [row]
