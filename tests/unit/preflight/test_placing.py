"""Shared devices and places on nodes: the same verdict in the check, in `--plan` and at a start."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import ray

from roll_r3 import run
from roll_r3.cluster import placement
from roll_r3.cluster.placement import Device, Placement
from roll_r3.cluster.rollouts import RolloutGroup
from roll_r3.config.devices import MAX_DEVICES
from roll_r3.config.findings.report import Finding
from roll_r3.config.load import load
from roll_r3.config.pipeline import RLVRConfig
from roll_r3.config.rules.devices import LOOPBACK, RULES
from roll_r3.config.rules.example import MINIMAL
from roll_r3.config.rules.table import check_rows
from roll_r3.errors import ConfigError

CONFIGS = Path(__file__).parents[3] / "configs"
HOST = "actor_infer.strategy_args.strategy_config.host"
TP_SIZE = "actor_infer.strategy_args.strategy_config.tp_size"
GPUS = "device_type=cuda"
PLACES = ("gpus-not-shared", "engine-on-one-node", "engines-beyond-loopback", "devices-unnamed")


@pytest.fixture
def minimal(tmp_path: Path) -> Path:
    """Write a configuration with a trainer on device 0."""
    path = tmp_path / "run.yaml"
    path.write_text(MINIMAL)
    return path


def found(path: Path, *overrides: str, per_node: int | None = None) -> list[Finding]:
    nodes = [] if per_node is None else [f"num_gpus_per_node={per_node}"]
    findings = check_rows(load(path, [*overrides, *nodes]).config, RULES)
    return [finding for finding in findings if finding.rule in PLACES]


def test_an_engine_on_two_nodes_is_an_error_where_nodes_are_known(minimal):
    overrides = (GPUS, f"{HOST}=0.0.0.0", "actor_infer.device_mapping=range(1, 9)", f"{TP_SIZE}=4")
    (finding,) = found(minimal, *overrides, per_node=8)
    assert (finding.rule, finding.severity, finding.path) == (
        "engine-on-one-node",
        "error",
        "actor_infer.device_mapping",
    )
    assert "engine 1 takes devices 5, 6, 7, 8, on nodes 0, 1; nodes of 8" in finding.why
    assert finding.concerns(TP_SIZE)
    assert found(minimal, *overrides, per_node=9) == []
    both = found(minimal, *overrides, per_node=3)[0]
    assert "engine 0 (and 1 more) takes devices 1, 2, 3, 4, on nodes 0, 1; nodes of 3" in both.why


def test_nodes_that_are_assumed_are_warned_of(minimal):
    overrides = (f"{HOST}=0.0.0.0", "actor_infer.device_mapping=range(1, 9)", f"{TP_SIZE}=4")
    assert [f.severity for f in found(minimal, GPUS, *overrides)] == ["warning"]
    assert [f.severity for f in found(minimal, "device_type=auto", *overrides, per_node=8)] == ["warning"]
    assert found(minimal, *overrides, per_node=8) == [], "CPU slots are places of one machine"


@pytest.mark.parametrize("host", LOOPBACK)
def test_a_loopback_engine_on_another_node_than_the_trainer_is_said(minimal, host):
    overrides = (GPUS, "actor_infer.device_mapping=range(1, 4)", f"{HOST}={host}")
    (finding,) = found(minimal, *overrides, per_node=2)
    assert (finding.rule, finding.severity, finding.path) == ("engines-beyond-loopback", "error", HOST)
    assert "engines 1, 2 are not on node 0" in finding.why
    assert "0.0.0.0" in finding.fix
    assert found(minimal, *overrides, per_node=4) == []
    plain = "actor_infer.strategy_args={strategy_name: hf_infer}"
    assert found(minimal, *overrides[:2], plain, per_node=2) == [], "it has no server, so no address"
    assert found(minimal, *overrides, f"{HOST}=0.0.0.0", per_node=2) == []
    many = "actor_infer.device_mapping=range(1, 9)"
    assert [f.severity for f in found(minimal, GPUS, many)] == ["warning"], "nodes of 8 are assumed"


def test_the_trainers_node_is_that_of_its_first_rank(minimal):
    overrides = (GPUS, "actor_train.device_mapping=[2, 0]", "actor_infer.device_mapping=[1, 3]")
    (finding,) = found(minimal, *overrides, per_node=2)
    assert "engines 0 are not on node 1" in finding.why


def test_devices_that_are_reserved_and_not_used_are_a_warning(minimal):
    (finding,) = found(minimal, "actor_infer.device_mapping=[20]")
    assert (finding.rule, finding.severity) == ("devices-unnamed", "warning")
    assert "of 21 devices no role uses 1, 2, 3, 4, 5, 6, 7, 8 and 11 more" in finding.why
    assert [path for path, _ in finding.found] == ["actor_train.device_mapping", "actor_infer.device_mapping"]


@pytest.mark.timeout(30)
def test_a_large_cluster_is_looked_at(minimal):
    overrides = (GPUS, "actor_train.device_mapping=range(20000)", "actor_infer.device_mapping=range(20000, 40000)")
    assert found(minimal, f"{HOST}=0.0.0.0", *overrides, "rollout_batch_size=20000") == []


def test_a_device_far_beyond_the_others_is_a_warning(minimal):
    (finding,) = found(minimal, f"actor_infer.device_mapping=[{MAX_DEVICES - 1}]")
    assert f"no role uses 1, 2, 3, 4, 5, 6, 7, 8 and {MAX_DEVICES - 10:,} more" in finding.why


@pytest.mark.parametrize("file", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_examples_are_placed_well(file):
    assert found(file) == []


def looked_at(path: Path, *overrides: str) -> list[str]:
    return ["--config", str(path), "--elsewhere", *overrides]


@pytest.mark.parametrize(
    ("device_type", "status", "said"),
    [("cuda", 2, "error [gpus-not-shared]"), ("auto", 0, "warning [gpus-not-shared]"), ("cpu", 0, "")],
)
@pytest.mark.parametrize("action", ["--validate-only", "--plan"])
def test_shared_devices_are_said_before_the_start(minimal, capsys, device_type, status, said, action):
    overrides = ("actor_train.device_mapping=range(8)", "actor_infer.device_mapping=range(8)")
    assert run.main([action, *looked_at(minimal, *overrides, f"device_type={device_type}")]) == status
    out, err = capsys.readouterr()
    assert said in err
    assert ("gpus-not-shared" in err) == bool(said)
    if said:
        assert "an engine cannot share a GPU (it can share a CPU slot)" in err
        assert "actor_train also has devices 0, 1, 2, 3, 4, 5, 6, 7" in err
        assert "give actor_infer devices of its own" in err
    if action == "--validate-only" and not status:
        assert ("on CPU slots only" in out) == (device_type == "auto")


def test_a_file_of_rolls_means_gpus(tmp_path, capsys):
    path = tmp_path / "roll.yaml"
    worker = "roll.pipeline.rlvr.rewards.math_rule_reward_worker.MathRuleRewardWorker"
    own = "rewards: {math_rule: {worker_cls: " + worker + "}}\ndevice_type: auto\n"
    path.write_text(MINIMAL.replace("device_type: cpu\n", "") + own.replace("device_type: auto\n", ""))
    sharing = ("num_return_sequences_in_group=4", "rewards.math_rule.reward=exact_match")
    assert run.main(["--validate-only", *looked_at(path, *sharing)]) == 2
    assert "error [gpus-not-shared]" in capsys.readouterr().err
    path.write_text(MINIMAL.replace("device_type: cpu\n", "") + own)
    run.main(["--validate-only", *looked_at(path, *sharing)])
    assert "warning [gpus-not-shared]" in capsys.readouterr().err, "unless it says otherwise"


@pytest.mark.parametrize("action", ["--validate-only", "--plan"])
def test_an_engine_out_of_reach_ends_every_look_with_status_2(minimal, capsys, action):
    wrong = (GPUS, "num_gpus_per_node=2", "actor_infer.device_mapping=[1, 2]", f"{TP_SIZE}=2")
    assert run.main([action, *looked_at(minimal, *wrong)]) == 2
    assert "error [engine-on-one-node]" in capsys.readouterr().err
    assert run.main([action, *looked_at(minimal, *wrong), "--format", "json"]) == 2
    printed = json.loads(capsys.readouterr().out)
    assert [finding["rule"] for finding in printed["findings"]] == ["engine-on-one-node"]


def test_a_warning_stands_with_the_plan_and_its_status_is_0(minimal, capsys):
    arguments = looked_at(minimal, "--plan", "actor_infer.device_mapping=[2]")
    assert run.main(arguments) == 0
    out, err = capsys.readouterr()
    assert "weights to the engines" in out
    assert "warning [devices-unnamed]" in err
    assert run.main([*arguments, "--format", "json"]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert [finding["rule"] for finding in json.loads(out)["findings"]] == ["devices-unnamed"]


def test_the_command_line_plans_each_role_with_its_own_model(minimal, capsys):
    reference = [
        "use_kl_loss=true",
        "reference.device_mapping=range(2, 49)",
        "reference.strategy_args.strategy_config.pipeline_model_parallel_size=47",
    ]
    arguments = looked_at(minimal, "--plan", "num_gpus_per_node=64", *reference)
    assert run.main([*arguments, "reference.model_args.model_name_or_path=Qwen/Qwen3-235B-A22B"]) == 0
    out = capsys.readouterr().out
    assert "Qwen/Qwen3-235B-A22B: 235 B parameters" in out
    assert "1 node of 64" in out
    assert run.main([*arguments, "reference.model_args.model_name_or_path=someone/some-model"]) == 2
    assert "the model of reference, but someone/some-model is neither" in capsys.readouterr().err


def placed(*nodes: str) -> Placement:
    """Return a placement with devices on these nodes."""
    devices = [Device(i, i, node_id=node, node_ip=f"10.0.0.{node}", gpu_id=0) for i, node in enumerate(nodes)]
    return Placement("cuda", None, tuple(devices))  # type: ignore[arg-type]  no process is started


@pytest.mark.parametrize(
    ("overrides", "nodes", "said"),
    [
        (
            ["actor_infer.device_mapping=[1, 2]", f"{TP_SIZE}=2"],
            "112",
            "must share a node .*engine 0 takes devices 1, 2",
        ),
        (["actor_infer.device_mapping=[1, 2]"], "112", "engines 1 are not on node 10.0.0.1 .*host: 0.0.0.0"),
    ],
)
def test_placement_is_checked_again_on_the_clusters_nodes(minimal, tmp_path, overrides, nodes, said):
    config = load(minimal, [GPUS, "num_gpus_per_node=8", *overrides]).config
    assert check_rows(config, RULES) == []
    with pytest.raises(ConfigError, match=said):
        RolloutGroup.launch(config, placed(*nodes), tmp_path)


@pytest.mark.parametrize("other", ["actor_train", "reference"])
def test_an_engine_shares_no_gpu_of_the_cluster(monkeypatch: pytest.MonkeyPatch, other: str) -> None:
    monkeypatch.setattr(ray, "cluster_resources", lambda: {"GPU": 8.0, "CPU": 8.0})
    own = {"actor_train": {"device_mapping": [0]}, "reference": {"device_mapping": [1]}}
    config = RLVRConfig(exp_name="x", pretrain="p", use_kl_loss=True, actor_infer={"device_mapping": [2]}, **own)
    assert placement.resolve_device_kind(config) == "cuda"
    shared = config.model_copy(update={other: getattr(config, other).model_copy(update={"device_mapping": (2, 3)})})
    with pytest.raises(ConfigError, match=rf"{other} also has devices 2"):
        placement.resolve_device_kind(shared)
    assert placement.resolve_device_kind(shared.model_copy(update={"device_type": "cpu"})) == "cpu"
