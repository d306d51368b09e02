"""What launch does before there is a cluster."""

from __future__ import annotations

from roll_r3.config.pipeline import RLVRConfig
from roll_r3.pipelines.launch import with_absolute_checkpoints


def test_checkpoint_directories_become_absolute_and_hub_names_stay(tmp_path, monkeypatch):
    (tmp_path / "mine").mkdir()
    monkeypatch.chdir(tmp_path)
    config = RLVRConfig(
        exp_name="x",
        pretrain="owner/model",
        actor_train={"model_args": {"model_name_or_path": "mine"}},
        actor_infer={},
    )
    launched = with_absolute_checkpoints(config)
    assert launched.pretrain == "owner/model"
    assert launched.actor_train.model_args.model_name_or_path == str(tmp_path / "mine")
    assert launched.actor_train.training_args == config.actor_train.training_args
