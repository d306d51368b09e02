"""What launch does before there is a cluster."""

from __future__ import annotations

import pytest

from roll_r3.config.pipeline import RLVRConfig
from roll_r3.pipelines.launch import with_absolute_paths


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
    for other in ("no/such/python", "python3"):  # what the check refuses, and what PATH finds
        assert launched(other).actor_infer.strategy_args.strategy_config.python == other
