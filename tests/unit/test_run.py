"""The command line, up to the point where a run would start."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from roll_r3 import run
from roll_r3.config.load import load_config
from roll_r3.errors import ConfigError, EngineError
from tests.unit.config.conftest import MINIMAL

ROOT = Path(__file__).parents[2]


@pytest.fixture
def config_file(tmp_path: Path) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text(MINIMAL)
    return path


def launch_with(monkeypatch: pytest.MonkeyPatch, launch: Any) -> None:
    """Put `launch` where the command line looks for it."""
    module = ModuleType("roll_r3.pipelines.launch")
    module.launch = launch  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "roll_r3.pipelines.launch", module)


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
    arguments = ["--config", str(config_file), "--validate-only", "actor_infer.generating_args.top_p=0.9"]
    assert run.main(arguments) == 0
    out, err = capsys.readouterr()
    assert out.startswith("valid")
    assert "warning [truncated-sampling]" in err


def test_print_config_prints_a_configuration(config_file, capsys, tmp_path):
    assert run.main(["--config", str(config_file), "--print-config", "seed=7"]) == 0
    printed = tmp_path / "printed.yaml"
    printed.write_text(capsys.readouterr().out)
    assert load_config(printed) == load_config(config_file, ["seed=7"])
    assert run.main(["--config", str(printed), "--validate-only"]) == 0, "no default counts as something the user set"


@pytest.mark.parametrize("path", sorted(ROOT.glob("configs/**/*.yaml")), ids=lambda p: p.name)
def test_every_shipped_configuration_is_valid(path):
    assert run.main(["--config", str(path), "--validate-only"]) == 0


def test_a_valid_configuration_is_launched(config_file, monkeypatch):
    seen = []
    launch_with(monkeypatch, lambda config: seen.append(config) or 0)
    assert run.main(["--config", str(config_file), "max_steps=3"]) == 0
    assert seen == [load_config(config_file, ["max_steps=3"])]


@pytest.mark.parametrize(
    ("error", "status", "message"),
    [
        (EngineError("the engine died"), 1, "error: the engine died\n"),
        (ConfigError("the model has no MoE layer"), 2, "the model has no MoE layer\n"),
        (KeyboardInterrupt(), 130, "interrupted\n"),
    ],
)
def test_a_failed_run_ends_with_a_message_and_a_status(config_file, monkeypatch, capsys, error, status, message):
    def launch(config: Any) -> int:
        raise error

    launch_with(monkeypatch, launch)
    assert run.main(["--config", str(config_file)]) == status
    assert capsys.readouterr().err == message


def test_an_unexpected_error_keeps_its_traceback(config_file, monkeypatch):
    def launch(config: Any) -> int:
        raise ZeroDivisionError

    launch_with(monkeypatch, launch)
    with pytest.raises(ZeroDivisionError):
        run.main(["--config", str(config_file)])


def test_checking_a_file_imports_no_engine(config_file):
    code = (
        "import sys\n"
        "from roll_r3.run import main\n"
        f"assert main(['--config', {str(config_file)!r}, '--validate-only']) == 0\n"
        "heavy = {'torch', 'ray', 'transformers', 'sglang', 'megatron', 'mbridge', 'vllm', 'datasets'}\n"
        "sys.exit(', '.join(sorted(heavy & set(sys.modules))) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr


def test_usage_errors_have_status_2():
    done = subprocess.run(
        [sys.executable, "-m", "roll_r3.run"], capture_output=True, text=True, timeout=60, check=False, cwd=ROOT
    )
    assert done.returncode == 2
    assert "--config" in done.stderr
