"""Mistakes that only a plan shows, and how the command line says them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from roll_r3 import run
from roll_r3.cluster import groups
from roll_r3.config.devices import MAX_DEVICES
from roll_r3.config.load import load
from roll_r3.config.report import Finding
from roll_r3.config.rules.example import MINIMAL
from roll_r3.preflight.plan import make_plan
from roll_r3.preflight.plan_findings import LOOPBACK, PLAN_FINDINGS, plan_findings
from roll_r3.preflight.surroundings import elsewhere

CONFIGS = Path(__file__).parents[3] / "configs"
HOST = "actor_infer.strategy_args.strategy_config.host"
TP_SIZE = "actor_infer.strategy_args.strategy_config.tp_size"


def found(path: Path, *overrides: str, per_node: int = 8) -> list[Finding]:
    config = load(path, overrides).config
    raw = elsewhere(config).models[config.pretrain].raw
    plan = make_plan(config, {"actor_train": raw, "reference": raw}, devices_per_node=per_node)
    return plan_findings(config, plan)


@pytest.fixture
def minimal(tmp_path: Path) -> Path:
    """A trainer on device 0 and an engine where the overrides say."""
    path = tmp_path / "run.yaml"
    path.write_text(MINIMAL)
    return path


def test_an_engine_on_two_nodes_is_an_error(minimal):
    overrides = ("actor_infer.device_mapping=range(1, 9)", f"{TP_SIZE}=4")
    (finding,) = found(minimal, *overrides)
    assert (finding.rule, finding.severity, finding.path) == (
        "engine-on-one-node",
        "error",
        "actor_infer.device_mapping",
    )
    assert "engine 1 takes devices 5, 6, 7, 8, on nodes 0, 1 of 8" in finding.why
    assert finding.concerns(TP_SIZE)
    assert found(minimal, *overrides, per_node=9) == []
    both = found(minimal, *overrides, per_node=3)[0]
    assert "engine 0 (and 1 more) takes devices 1, 2, 3, 4, on nodes 0, 1 of 3" in both.why


@pytest.mark.parametrize("host", LOOPBACK)
def test_a_loopback_engine_on_another_node_than_the_trainer_is_a_warning(minimal, host):
    overrides = ("actor_infer.device_mapping=range(1, 4)", f"{HOST}={host}")
    (finding,) = found(minimal, *overrides, per_node=2)
    assert (finding.rule, finding.severity, finding.path) == ("engines-beyond-loopback", "warning", HOST)
    assert finding.why.endswith("engines 1, 2 are not on node 0")
    assert found(minimal, *overrides, per_node=4) == []
    plain = "actor_infer.strategy_args={strategy_name: hf_infer}"
    assert found(minimal, overrides[0], plain, per_node=2) == [], "it has no server, so no address"
    assert found(minimal, *overrides, f"{HOST}=0.0.0.0", per_node=2) == []


def test_addresses_are_those_that_the_cluster_refuses():
    assert LOOPBACK == groups.LOOPBACK


def test_the_trainers_node_is_that_of_its_first_rank(minimal):
    overrides = ("actor_train.device_mapping=[2, 0]", "actor_infer.device_mapping=[1, 3]")
    (finding,) = found(minimal, *overrides, per_node=2)
    assert finding.why.endswith("engines 0 are not on node 1")


def test_devices_that_are_reserved_and_not_used_are_a_warning(minimal):
    (finding,) = found(minimal, "actor_infer.device_mapping=[20]", f"{HOST}=0.0.0.0")
    assert (finding.rule, finding.severity) == ("devices-unnamed", "warning")
    assert finding.why.endswith("of 21 devices nobody uses 1, 2, 3, 4, 5, 6, 7, 8 and 11 more")
    assert [path for path, _ in finding.found] == ["actor_train.device_mapping", "actor_infer.device_mapping"]


@pytest.mark.timeout(30)
def test_a_large_cluster_is_planned(minimal):
    """Ranks are gone through once, not once for each shard of the data."""
    overrides = (f"{HOST}=0.0.0.0", *(f"{role}.device_mapping=range(20000)" for role in ("actor_train", "actor_infer")))
    assert found(minimal, *overrides, "rollout_batch_size=20000") == []


def test_a_device_far_beyond_the_others_is_a_warning(minimal):
    (finding,) = found(minimal, f"actor_infer.device_mapping=[{MAX_DEVICES - 1}]", f"{HOST}=0.0.0.0")
    assert finding.why.endswith(f"nobody uses 1, 2, 3, 4, 5, 6, 7, 8 and {MAX_DEVICES - 10:,} more")


@pytest.mark.parametrize("file", sorted(CONFIGS.glob("*gpu*.yaml")), ids=lambda path: path.stem)
def test_examples_are_placed_well(file):
    assert found(file) == []


def test_an_error_follows_the_plan_with_status_2(minimal, capsys):
    arguments = ["--config", str(minimal), "--plan", "--elsewhere", "--devices-per-node", "2"]
    wrong = ["actor_infer.device_mapping=[1, 2]", f"{TP_SIZE}=2"]
    assert run.main([*arguments, *wrong]) == 2
    out, err = capsys.readouterr()
    assert "weights to the engines" in out
    assert "error [engine-on-one-node]" in err
    assert run.main([*arguments, *wrong, "--format", "json"]) == 2
    printed = json.loads(capsys.readouterr().out)
    assert [finding["rule"] for finding in printed["findings"]] == ["engine-on-one-node"]
    assert printed["roles"]


def test_a_warning_follows_the_plan_with_status_0(minimal, capsys):
    arguments = ["--config", str(minimal), "--plan", "--elsewhere", "actor_infer.device_mapping=[2]"]
    assert run.main(arguments) == 0
    out, err = capsys.readouterr()
    assert "weights to the engines" in out
    assert "warning [devices-unnamed]" in err


def test_the_command_line_plans_each_role_with_its_own_model(minimal, capsys):
    reference = [
        "use_kl_loss=true",
        "reference.device_mapping=range(2, 49)",
        "reference.strategy_args.strategy_config.pipeline_model_parallel_size=47",
    ]
    arguments = ["--config", str(minimal), "--plan", "--elsewhere", "--devices-per-node", "64", *reference]
    assert run.main([*arguments, "reference.model_args.model_name_or_path=Qwen/Qwen3-235B-A22B"]) == 0
    assert "Qwen/Qwen3-235B-A22B: 235 B parameters" in capsys.readouterr().out
    assert run.main([*arguments, "reference.model_args.model_name_or_path=someone/some-model"]) == 2
    assert "the model of reference, and someone/some-model is neither here" in capsys.readouterr().err


def test_ids_are_those_that_are_described(minimal):
    overrides = ("actor_infer.device_mapping=[3, 4]", f"{TP_SIZE}=2")
    assert {finding.rule for finding in found(minimal, *overrides, per_node=2)} == set(PLAN_FINDINGS)
