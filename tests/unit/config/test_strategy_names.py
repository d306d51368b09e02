"""Strategies are chosen by name, each with its own settings."""

from __future__ import annotations

import pytest
import yaml

from roll_r3.config.load import load
from roll_r3.config.load import load_text as load_text_as_it_is
from roll_r3.config.rules.example import MINIMAL
from roll_r3.preflight.check import check
from roll_r3.preflight.surroundings import Surroundings
from tests.unit.config.conftest import findings_of, only


def test_of_another_strategy_nothing_is_said_about_its_settings(load_text):
    strategy = "{strategy_name: tensorrt, strategy_config: {gpu_memory_utilization: 0.8, tp_size: two}}"
    finding = only(load_text, MINIMAL, f"actor_infer.strategy_args={strategy}")
    assert finding.path == "actor_infer.strategy_args.strategy_name"
    assert finding.fix == "write one of sglang, vllm, hf_infer"
    loaded = load_text_as_it_is(MINIMAL, "run.yaml", [f"actor_infer.strategy_args={strategy}"])
    assert "actor_infer.strategy_args" in loaded.doubtful, "rules do not judge its defaults"
    only(load_text, MINIMAL, f"actor_infer.strategy_args={strategy.replace('two', 'yes')}")
    right = "{strategy_name: sglang, strategy_config: {gpu_memory_share: 0.8, tp_size: two}}"
    assert len(findings_of(load_text, MINIMAL, f"actor_infer.strategy_args={right}")) == 2
    others = findings_of(load_text, MINIMAL, f"actor_infer.strategy_args={strategy}", "actor_train.strategy_args.x=1")
    assert len(others) == 2, "of another role it is"


NAMES = {
    "actor_infer": ("sglang", "vllm", "hf_infer"),
    "actor_train": ("megatron_train", "fsdp2_train"),
    "reference": ("megatron_infer", "fsdp2_infer"),
}


@pytest.mark.parametrize("role", NAMES)
@pytest.mark.parametrize("name", ["tensorrt", "Sglang", "[a]", "{a: b}", "3", "null", "true", "''"])
def test_a_strategy_that_there_is_not_is_one_mistake_whatever_its_settings_are(load_text, role, name):
    args = (
        f"{role}.strategy_args={{strategy_name: {name}, strategy_config: {{gpu_memory_utilization: 0.8, tp_size: x}}}}"
    )
    finding = only(load_text, MINIMAL, args)
    assert (finding.rule, finding.path) == ("bad-value", f"{role}.strategy_args.strategy_name")
    assert finding.found[0][1] == yaml.safe_load(name)
    assert finding.why == "must be " + " or ".join(map(repr, NAMES[role]))


@pytest.mark.parametrize("role", NAMES)
def test_a_strategy_is_chosen_by_its_name_and_its_settings_are_its_own(load_text, role):
    default = NAMES[role][0]
    for written, meant in (("{}", default), *((f"{{strategy_name: {name}}}", name) for name in NAMES[role])):
        args = dict(load_text(MINIMAL, f"{role}.strategy_args={written}").config)[role].strategy_args
        assert args.strategy_name == meant
    foreign = "zzz" if role == "actor_infer" else "recompute"
    finding = only(load_text, MINIMAL, f"{role}.strategy_args={{strategy_config: {{{foreign}: true}}}}")
    assert finding.rule == "unknown-field", "without a name the settings are those of the first strategy"


def test_only_settings_of_the_named_strategy_are_suggested(load_text):
    sglang = "actor_infer.strategy_args={strategy_name: sglang, strategy_config: {tp_sise: 2}}"
    hf = "actor_infer.strategy_args={strategy_name: hf_infer, strategy_config: {zzz: 2}}"
    assert only(load_text, MINIMAL, sglang).fix == "did you mean actor_infer.strategy_args.strategy_config.tp_size?"
    assert only(load_text, MINIMAL, hf).fix == "fields here: dtype, max_running_requests, weight_bucket_mb"


def test_of_a_strategy_that_there_is_not_nothing_is_known_and_other_mistakes_show(tmp_path):
    (tmp_path / "run.yaml").write_text(MINIMAL)
    unknown = "actor_train.strategy_args={strategy_name: vllm, strategy_config: {pipeline_model_parallel_size: 3}}"
    loaded = load(tmp_path / "run.yaml", [unknown, "actor_train.device_mapping=range(3)", "max_steps=0"])
    assert {f.path for f in loaded.findings} == {"max_steps", "actor_train.strategy_args.strategy_name"}
    assert "actor_train.strategy_args" in loaded.doubtful
    found = {f.path for f in check(loaded, Surroundings())}
    assert found == {*(f.path for f in loaded.findings), "pretrain"}, "no layout, so nothing on samples over ranks"
