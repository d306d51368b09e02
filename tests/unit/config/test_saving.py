"""Settings of saving and resuming."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

from roll_r3.config.derived import saving_dir
from roll_r3.config.pipeline import RLVRConfig


def config_of(**fields: object) -> RLVRConfig:
    return RLVRConfig.model_validate({"exp_name": "x", "pretrain": "p", "actor_train": {}, "actor_infer": {}} | fields)


def test_a_run_saves_without_being_told_and_begins_anew():
    config = config_of()
    assert (config.save_steps, config.max_ckpt_to_keep, config.save_hf_steps) == (50, 0, 0)
    assert config.resume_from_checkpoint == "off"
    assert saving_dir(config) == config.output_dir


@pytest.mark.parametrize("value", [False, "off"])
def test_yaml_reads_a_bare_off_as_false(value):
    assert config_of(resume_from_checkpoint=value).resume_from_checkpoint == "off"


@pytest.mark.parametrize("value", [True, "", 3])
def test_what_names_no_checkpoint_is_refused(value):
    with pytest.raises(ValidationError, match="resume_from_checkpoint"):
        config_of(resume_from_checkpoint=value)


def test_checkpoints_have_a_place_of_their_own():
    assert saving_dir(config_of(checkpoint_config={"output_dir": "/disk"})) == "/disk"
