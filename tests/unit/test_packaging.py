"""The pins in pyproject.toml and the list that is installed say the same."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

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
