"""The command line, up to the point where a run would start."""

from __future__ import annotations

import json
import os
import re
import resource
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from roll_r3 import run
from roll_r3.config.load import load
from roll_r3.config.rules.example import MINIMAL
from roll_r3.errors import ConfigError, EngineError
from roll_r3.models.known import known_config
from roll_r3.preflight.rules import ALL_RULES

ROOT = Path(__file__).parents[2]


@pytest.fixture
def config_file(tmp_path: Path) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text(MINIMAL)
    return path


def launch_with(monkeypatch: pytest.MonkeyPatch, launch: Any) -> None:
    """Replace the `launch` called by the command line."""
    module = ModuleType("roll_r3.pipelines.lifecycle.launch")
    module.launch = launch  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "roll_r3.pipelines.lifecycle.launch", module)


def test_validate_only_says_what_would_run(config_file, capsys):
    assert run.main(["--config", str(config_file), "--validate-only"]) == 0
    out = capsys.readouterr().out
    assert out.startswith(f"valid: {config_file}")
    assert "router replay: R3" in out


def test_findings_go_to_stderr_with_status_2(config_file, capsys):
    arguments = ["--config", str(config_file), "seed=1", "--validate-only", "actor_infer.router_replay.mode=off"]
    assert run.main(arguments) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert "r3-on-both-sides" in err
    assert run.main(["--config", str(config_file), "sead=1"]) == 2
    assert "did you mean seed?" in capsys.readouterr().err


def test_warnings_do_not_stop(config_file, capsys):
    truncated = "actor_infer.generating_args={top_p: 0.9, sampling_mask: false}"
    arguments = ["--config", str(config_file), "--validate-only", truncated]
    assert run.main(arguments) == 0
    out, err = capsys.readouterr()
    assert out.startswith("valid")
    assert "warning [truncated-sampling]" in err


def test_print_config_prints_a_configuration(config_file, capsys, tmp_path):
    assert run.main(["--config", str(config_file), "--print-config", "seed=7"]) == 0
    printed = tmp_path / "printed.yaml"
    printed.write_text(capsys.readouterr().out)
    assert load(printed).config == load(config_file, ["seed=7"]).config
    assert run.main(["--config", str(printed), "--validate-only"]) == 0, "no default counts as something the user set"


@pytest.mark.parametrize("path", sorted(ROOT.glob("configs/**/*.yaml")), ids=lambda p: p.name)
def test_every_shipped_configuration_is_valid(path, capsys):
    assert run.main(["--config", str(path), "--validate-only", "--elsewhere"]) == 0
    known = "not known on this machine" not in capsys.readouterr().out
    assert known or path.name.startswith("quickstart"), "its model is in the bundled table"


@pytest.mark.parametrize("path", sorted(ROOT.glob("examples/**/*.yaml")), ids=lambda p: p.parent.name)
def test_every_example_lacks_nothing_but_the_model_that_the_quickstart_makes(path, capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.syspath_prepend(str(ROOT))
    model = ROOT / "no" / "such" / "model"
    assert run.main(["--config", str(path), "--validate-only", f"pretrain={model}"]) == 2
    said = capsys.readouterr().err
    assert re.findall(r"^error \[(.*?)\]", said, re.MULTILINE) == ["checkpoint-readable"], said


def test_eval_only_evaluates_and_needs_prompts(config_file, monkeypatch, capsys):
    module = ModuleType("roll_r3.pipelines.lifecycle.launch")
    evaluated: list[Any] = []
    module.evaluate = lambda config, origins: evaluated.append(config) or 0  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "roll_r3.pipelines.lifecycle.launch", module)
    assert run.main(["--config", str(config_file), "--eval-only"]) == 2
    assert "--eval-only needs prompts to evaluate: add the section `validation`" in capsys.readouterr().err
    prompts = "validation={data_args: {file_name: 'bundled:copy_digits'}}"
    assert run.main(["--config", str(config_file), prompts, "--eval-only"]) == 0
    assert evaluated[0].validation.data_args.file_name == "bundled:copy_digits"
    with pytest.raises(SystemExit):
        run.main(["--config", str(config_file), "--eval-only", "--plan"])


def test_a_valid_configuration_is_launched(config_file, monkeypatch):
    seen = []
    launch_with(monkeypatch, lambda config, origins: seen.append(config) or 0)
    assert run.main(["--config", str(config_file), "max_steps=3"]) == 0
    assert seen == [load(config_file, ["max_steps=3"]).config]


@pytest.mark.parametrize(
    ("error", "status", "message"),
    [
        (EngineError("the engine died"), 1, "error: the engine died\n"),
        (ConfigError("the model has no MoE layer"), 2, "the model has no MoE layer"),
        (OSError(28, "No space left on device", "metrics.jsonl"), 1, "error: [Errno 28] No space left on device: "),
        (KeyboardInterrupt(), 130, "interrupted\n"),
    ],
)
def test_a_failed_run_ends_with_a_message_and_a_status(config_file, monkeypatch, capsys, error, status, message):
    def launch(config: Any, origins: Any) -> int:
        raise error

    launch_with(monkeypatch, launch)
    assert run.main(["--config", str(config_file)]) == status
    assert message in capsys.readouterr().err


def test_a_run_has_the_variables_of_its_file(config_file, monkeypatch):
    def launch(config: Any, origins: Any) -> int:
        return 0 if os.environ.get("DEMO_TOKEN") == "x" else 1

    launch_with(monkeypatch, launch)
    assert run.main(["--config", str(config_file), "system_envs={DEMO_TOKEN: x}"]) == 0
    assert "DEMO_TOKEN" not in os.environ


def test_a_check_looks_into_the_hubs_cache_of_its_file(config_file, tmp_path, capsys):
    model = tmp_path / "models--own--tiny"
    (model / "refs").mkdir(parents=True)
    (model / "refs" / "main").write_text("abc")
    (model / "snapshots" / "abc").mkdir(parents=True)
    (model / "snapshots" / "abc" / "config.json").write_text(json.dumps(known_config("Qwen/Qwen3-30B-A3B")))
    options = ["--config", str(config_file), "pretrain=own/tiny", "--plan"]
    assert run.main([*options, f"system_envs={{HF_HUB_CACHE: {tmp_path}}}"]) == 0, capsys.readouterr().err
    assert run.main([*options, "system_envs={A=B: '1'}"]) == 2
    assert "variable-names" in capsys.readouterr().err


def test_a_pipe_that_breaks_inside_a_run_is_no_success(config_file, monkeypatch, capsys):
    def launch(config: Any, origins: Any) -> int:
        raise BrokenPipeError(32, "Broken pipe")

    launch_with(monkeypatch, launch)
    assert run.main(["--config", str(config_file)]) == 1
    assert "error: [Errno 32] Broken pipe" in capsys.readouterr().err


def test_a_run_needs_nobody_who_reads_what_it_says(config_file, tmp_path):
    """As when the terminal of `python -m roll_r3.run ... 2>&1 | tee log` goes away."""
    code = (
        "import sys, types\n"
        "from roll_r3.tracking.progress import Progress\n"
        "def launch(config, origins):\n"
        "    with Progress(1) as progress:\n"
        "        for step in range(3):\n"
        "            progress.say(f'step {step}')\n"
        f"    open({str(tmp_path / 'saved')!r}, 'w').close()\n"
        "    Progress(1, sys.stdout).say('summary')\n"
        "    return 0\n"
        "sys.modules['roll_r3.pipelines.lifecycle.launch'] = types.SimpleNamespace(launch=launch)\n"
        "from roll_r3.run import main\n"
        f"sys.exit(main(['--config', {str(config_file)!r}]))"
    )
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run([sys.executable, "-c", code], stdout=write, stderr=write, timeout=60, check=False, cwd=ROOT)
    assert done.returncode == 0
    assert (tmp_path / "saved").exists()


def test_an_unexpected_error_keeps_its_traceback(config_file, monkeypatch):
    def launch(config: Any, origins: Any) -> int:
        raise ZeroDivisionError

    launch_with(monkeypatch, launch)
    with pytest.raises(ZeroDivisionError):
        run.main(["--config", str(config_file)])


TEN_MISTAKES = """\
exp_name: two words
pretrain: Qwen/Qwen3-30B-A3B
seed: 1
rollout_batch_size: sixteen
sead: 2
max_steps: ${steps}
output_dir: !!python/object/apply:os.getcwd []
pg_clip: 0.1
pg_clip: 0.2
dual_clip_loss: ${limit}
limit: 0.5
actor_train:
  router_replay: {mode: R3}
  data_args:
    file_name: not_here.jsonl
  strategy_args:
    strategy_name: megatron_train
    strategy_config:
      tensor_model_parallel_size: 3
      virtual_pipeline_model_parallel_size: 2
  device_mapping: list(range(0,3))
actor_infer:
  router_replay: {mode: "off"}
"""


def test_every_mistake_of_a_file_is_found_in_one_run_with_its_line(tmp_path, capsys):
    path = tmp_path / "run.yaml"
    path.write_text(TEN_MISTAKES)
    assert run.main(["--config", str(path), "--validate-only", "--format", "json", "kl_estimator=k2"]) == 2
    findings = json.loads(capsys.readouterr().out)["findings"]
    layout = "strategy_config"
    found = {(f["rule"], f["fields"][0]["path"].replace("actor_train.strategy_args.", "")): f for f in findings}
    expected = {
        ("bad-value", "exp_name"): 1,
        ("bad-value", "rollout_batch_size"): 4,
        ("unknown-field", "sead"): 5,
        ("interpolation", "max_steps"): 6,
        ("yaml-tag", "output_dir"): 7,
        ("duplicate-key", "pg_clip"): 9,
        ("dual-clip-above-one", "dual_clip_loss"): 10,
        ("unknown-field", "limit"): 11,
        ("r3-on-both-sides", "actor_train.router_replay.mode"): 13,
        ("data-readable", "actor_train.data_args.file_name"): 15,
        ("widths-over-tensor-parallel", f"{layout}.tensor_model_parallel_size"): 19,
        ("vpp-needs-pp", f"{layout}.virtual_pipeline_model_parallel_size"): 20,
        ("kl-estimator-unread", "kl_estimator"): None,
        ("gpus-not-shared", "actor_infer.device_mapping"): 22,
    }
    assert set(found) == set(expected)
    assert {key: found[key]["fields"][0].get("line") for key in expected} == expected
    assert found[("kl-estimator-unread", "kl_estimator")]["fields"][0]["origin"] == "override kl_estimator=k2"
    origin = found[("dual-clip-above-one", "dual_clip_loss")]["fields"][0]["origin"]
    assert origin == f"{path}:10, from ${{limit}} at {path}:11"
    assert all(f["why"] and f["fields"] for f in findings)
    assert found[("dual-clip-above-one", "dual_clip_loss")]["fields"][0]["value"] == 0.5, "a number, not its text"


def test_a_file_of_roll_is_checked_like_any_other(capsys):
    path = ROOT / "tests" / "unit" / "from_roll" / "files" / "sglang.yaml"
    assert run.main(["--config", str(path), "--validate-only", "--elsewhere"]) == 0
    out, err = capsys.readouterr()
    assert out.startswith(f"valid: {path}")
    assert "note [roll-translated]" in err
    assert "warning [roll-unread]" in err
    assert run.main(["--config", str(path), "--validate-only", "--elsewhere", "critic_warmup=5", "sead=1"]) == 2
    err = capsys.readouterr().err
    assert "critic_warmup = 5  (override critic_warmup=5)" in err
    assert "did you mean seed?" in err
    assert run.main(["--config", str(path), "--print-config", "--elsewhere"]) == 0
    assert "dual_clip_loss: 1.4" in capsys.readouterr().out


def test_what_hangs_on_a_mistake_is_not_reported_twice(config_file, capsys):
    """No rule uses an unreadable value."""
    arguments = ["--config", str(config_file), "--validate-only", "actor_train.device_mapping=[a]", "reference={}"]
    assert run.main([*arguments, "actor_train.strategy_args.strategy_config.tensor_model_parallel_size=2"]) == 2
    err = capsys.readouterr().err
    assert "bad-value" in err
    assert "reference-unused" in err, "other rules are applied"
    assert "devices-over" not in err
    assert "samples-over" not in err


def test_explain_says_what_a_rule_is_about(capsys):
    assert run.main(["--explain", "vpp-needs-pp"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("vpp-needs-pp (error)")
    assert "Why:" in out
    assert "Fix:" in out
    assert "virtual_pipeline_model_parallel_size=2" in out
    assert run.main(["--explain", "duplicate-key"]) == 0
    assert run.main(["--explain", "vpp-need-pp"]) == 2
    assert "did you mean vpp-needs-pp" in capsys.readouterr().err
    assert run.main(["--explain", "list"]) == 0
    listed = capsys.readouterr().out.split()
    assert {rule.id for rule in ALL_RULES} < set(listed)
    assert all(run.main(["--explain", rule]) == 0 for rule in listed)


@pytest.mark.parametrize(
    "arguments",
    [
        ["--format", "json"],
        ["--explain", "vpp-needs-pp"],
        ["--print-config", "--format", "json"],
        ["--plan", "--validate-only"],
    ],
)
def test_an_option_that_nothing_would_read_is_refused(config_file, arguments, capsys):
    with pytest.raises(SystemExit) as left:
        run.main(["--config", str(config_file), *arguments])
    assert left.value.code == 2
    assert "error:" in capsys.readouterr().err


def test_a_plan_is_printed_as_text_and_as_json(config_file, capsys):
    assert run.main(["--config", str(config_file), "--plan"]) == 0
    assert "actor_train" in capsys.readouterr().out
    assert run.main(["--config", str(config_file), "--plan", "--format", "json", "num_gpus_per_node=4"]) == 0
    assert json.loads(capsys.readouterr().out)["devices_per_node"] == 4
    assert run.main(["--config", str(config_file), "--plan", "--elsewhere", "pretrain=someone/some-model"]) == 2
    assert "needs the model of" in capsys.readouterr().err


@pytest.mark.parametrize("arguments", ["--explain list | head -1", "--config CONFIG --plan --format json | head -c 10"])
def test_a_reader_that_has_read_enough_is_no_error(config_file, arguments):
    command = f"set -o pipefail; {sys.executable} -m roll_r3.run {arguments.replace('CONFIG', str(config_file))}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=60, check=False, cwd=ROOT)
    assert done.returncode == 0
    assert done.stderr == ""


def test_letters_that_a_terminal_does_not_know_are_escaped(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(MINIMAL + "output_dir: m\u00fcll\n", encoding="utf-8")
    command = [sys.executable, "-m", "roll_r3.run", "--config", str(path), "--print-config"]
    environment = os.environ | {"PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"}
    done = subprocess.run(command, capture_output=True, timeout=60, check=False, cwd=ROOT, env=environment)
    assert done.returncode == 0, done.stderr
    assert b"m\\xfcll" in done.stdout


def cpu_seconds() -> float:
    """Return the processor time of all child processes waited for."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def test_a_thousand_devices_are_checked_within_a_second_and_no_engine_is_imported(tmp_path):
    path = tmp_path / "large.yaml"
    path.write_text(
        MINIMAL.replace("rollout_batch_size: 16", "rollout_batch_size: 1024").replace(
            "actor_train:",
            "actor_train:\n  device_mapping: list(range(0,1024))\n  training_args: {gradient_accumulation_steps: 4}",
        )
        + "  device_mapping: list(range(1024,2048))\n"
    )
    code = (
        "import sys\nfrom roll_r3.run import main\n"
        f"assert main(['--config', {str(path)!r}, '--validate-only']) == 0\n"
        "heavy = {'torch', 'ray', 'transformers', 'sglang', 'megatron', 'mbridge', 'vllm', 'pyarrow', 'omegaconf'}\n"
        "sys.exit(', '.join(sorted(heavy & set(sys.modules))) or 0)"
    )
    seconds = []
    for _ in range(3):
        before = cpu_seconds()
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
        seconds.append(cpu_seconds() - before)
        assert done.returncode == 0, done.stderr
    assert min(seconds) < 1.0, "processor time, which others on the machine do not add to"


def test_usage_errors_have_status_2():
    done = subprocess.run(
        [sys.executable, "-m", "roll_r3.run"], capture_output=True, text=True, timeout=60, check=False, cwd=ROOT
    )
    assert done.returncode == 2
    assert "--config" in done.stderr


ROLLS = ROOT / "tests" / "unit" / "from_roll" / "files" / "sglang.yaml"
ANYWHERE = "actor_infer.strategy_args.strategy_config.host=0.0.0.0"
"""Its engines are on another node than its trainer."""


def test_the_dialect_is_said_first(config_file, capsys):
    assert run.main(["--config", str(config_file), "--validate-only"]) == 0
    first = f"valid: {config_file} is read as a file of roll_r3 (dialect: roll_r3)"
    assert capsys.readouterr().out.splitlines()[0] == first
    assert run.main(["--config", str(ROLLS), ANYWHERE, "--validate-only", "--elsewhere"]) == 0
    out, err = capsys.readouterr()
    for line in (out.removeprefix("valid: ").splitlines()[0], err.splitlines()[0]):
        assert line.startswith(f"{ROLLS} is read as a file for ROLL (dialect: roll): rewards.*.worker_cls, ")
    assert run.main(["--config", str(ROLLS), "sead=1"]) == 2
    assert "(dialect: roll)" in capsys.readouterr().err.splitlines()[0]


@pytest.mark.parametrize("action", ["--validate-only", "--plan"])
def test_programs_are_told_the_dialect(capsys, action):
    assert run.main(["--config", str(ROLLS), ANYWHERE, action, "--elsewhere", "--format", "json"]) == 0
    said = json.loads(capsys.readouterr().out)["dialect"]
    assert (said["name"], said["given"], said["ours"]) == ("roll", False, [])
    assert "rewards.*.worker_cls" in said["rolls"]


def test_dropped_keys_are_one_line_unless_they_are_asked_for(capsys):
    arguments = ["--config", str(ROLLS), ANYWHERE, "--validate-only", "--elsewhere"]
    assert run.main(arguments) == 0
    short = capsys.readouterr().err
    (line,) = [line for line in short.splitlines() if "[roll-unread]" in line]
    assert re.search(r"\[roll-unread\] \d\d keys of ROLL dropped, .* \(--show-dropped lists them\)$", line)
    assert "logging_dir =" not in short
    assert run.main([*arguments, "--show-dropped"]) == 0
    long = capsys.readouterr().err
    number = int(re.search(r"(\d+) keys of ROLL dropped", long)[1])
    listed = long.split("[roll-unread]")[1].split("    fix: ")[0]
    assert len(listed.splitlines()) == 1 + number > 20
    assert "more fields" not in listed
    assert run.main([*arguments, "--format", "json"]) == 0
    (unread,) = [f for f in json.loads(capsys.readouterr().out)["findings"] if f["rule"] == "roll-unread"]
    assert len(unread["fields"]) == number


def test_a_list_of_dropped_keys_is_for_text(capsys):
    with pytest.raises(SystemExit):
        run.main(["--config", str(ROLLS), "--validate-only", "--format", "json", "--show-dropped"])
    assert "--show-dropped" in capsys.readouterr().err


def test_a_file_of_another_pipeline_is_one_error(tmp_path, capsys):
    path = tmp_path / "sft.yaml"
    path.write_text("sft_train: {model_args: {}}\nprompt_key: instruction\nmax_steps: many\n")
    assert run.main(["--config", str(path), "--validate-only", "--format", "json"]) == 2
    said = json.loads(capsys.readouterr().out)
    assert said["dialect"]["name"] == "roll"
    ((rule, fields),) = [(f["rule"], f["fields"]) for f in said["findings"]]
    assert (rule, fields[0]["path"], fields[0]["line"]) == ("roll-pipeline", "sft_train", 1)
