"""Releases of engines, found without starting their interpreter."""

from __future__ import annotations

from pathlib import Path

import pytest

from roll_r3.config.load import load_text
from roll_r3.config.rules.example import MINIMAL
from roll_r3.config.rules.paths import ENGINE
from roll_r3.preflight.surroundings import read_surroundings
from roll_r3.preflight.versions import find_interpreter, find_versions, versions_beside


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return an empty root directory, used as HOME."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.delenv("PYTHONPATH", raising=False)
    return tmp_path


def interpreter(folder: Path, settings: str | None = None) -> Path:
    python = folder / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text(f"#!/bin/sh\ntouch {folder}/started\n")
    python.chmod(0o755)
    if settings is not None:
        (folder / "pyvenv.cfg").write_text(settings)
    return python


def install(folder: Path, release: str, package: str = "sglang") -> None:
    info = folder / f"{package}-{release}.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Name: {package}\nVersion: {release}\n")


@pytest.mark.parametrize(
    "folder",
    [
        "usr/lib/python3.12/site-packages",
        "usr/lib/python3/dist-packages",
        "usr/local/lib/python3.12/dist-packages",
        "home/.local/lib/python3.12/site-packages",
    ],
)
def test_the_release_beside_another_interpreter(machine, folder):
    python = interpreter(machine / "usr")
    assert versions_beside(python, "sglang") == {}, "another folder may have it"
    install(machine / folder, "0.5.1")
    assert versions_beside(python, "sglang") == {"sglang": "0.5.1"}
    assert versions_beside(python, "megatron-core") == {}


def test_an_environment_sees_system_packages_only_if_its_settings_say_so(machine):
    interpreter(machine / "usr")
    install(machine / "usr/lib/python3/dist-packages", "0.5.1")
    closed = interpreter(machine / "closed", f"home = {machine}/usr/bin\ninclude-system-site-packages = false\n")
    opened = interpreter(machine / "opened", f"home = {machine}/usr/bin\ninclude-system-site-packages = true\n")
    assert versions_beside(closed, "sglang") == {"sglang": None}
    assert versions_beside(opened, "sglang") == {"sglang": "0.5.1"}
    assert versions_beside(opened, "vllm") == {}
    install(machine / "opened/lib/python3.12/site-packages", "0.5.2")
    assert versions_beside(opened, "sglang") == {"sglang": "0.5.2"}, "its own come first"
    install(machine / "named", "0.5.3")
    assert versions_beside(closed, "sglang", str(machine / "named")) == {"sglang": "0.5.3"}
    assert versions_beside(closed, "vllm", str(machine / "named")) == {}


def test_an_engine_is_found_on_the_path_that_its_server_starts_with(machine, monkeypatch):
    """SGLang's server inherits PYTHONPATH, vLLM's does not."""
    python = interpreter(machine / "closed", "include-system-site-packages = false\n")
    install(machine / "named", "0.5.3")
    install(machine / "named", "0.32.0", "vllm")
    monkeypatch.setenv("PYTHONPATH", str(machine / "named"))
    for engine, release in (("sglang", "0.5.3"), ("vllm", None)):
        chosen = f"actor_infer.strategy_args={{strategy_name: {engine}, strategy_config: {{python: {python}}}}}"
        assert find_versions(load_text(MINIMAL, "run.yaml", [chosen]).config)[engine] == release


def test_a_missing_package_is_certain_in_a_closed_environment_only(machine, monkeypatch):
    def versions(python: str) -> dict[str, str | None]:
        return find_versions(load_text(MINIMAL, "run.yaml", [f"{ENGINE}.python={python}"]).config)

    system = interpreter(machine / "usr")
    assert "sglang" not in versions(str(system))
    assert versions(str(interpreter(machine / "closed", "home = /usr/bin\n")))["sglang"] is None
    assert "sglang" not in versions("no-such-python")
    install(machine / "usr/lib/python3/dist-packages", "0.5.1")
    monkeypatch.setenv("PATH", str(system.parent))
    assert versions("python")["sglang"] == "0.5.1", "a name on PATH"


def test_the_interpreter_is_looked_for_as_it_will_be_started(machine, monkeypatch):
    python = interpreter(machine / "usr")
    monkeypatch.setenv("PATH", str(python.parent))
    assert find_interpreter("python") == find_interpreter(str(python)) == python
    assert find_interpreter("pythons") is None
    python.chmod(0o644)
    assert find_interpreter(str(python)) is None
    config = load_text(MINIMAL, "run.yaml", [f"{ENGINE}.python=python"]).config
    assert read_surroundings(config).engine_python_missing
    python.chmod(0o755)
    assert not read_surroundings(config).engine_python_missing


def test_no_interpreter_is_started(machine):
    """A file under check may name any program."""
    python = interpreter(machine / "named", "include-system-site-packages = false\n")
    read_surroundings(load_text(MINIMAL, "run.yaml", [f"{ENGINE}.python={python}"]).config)
    assert not (machine / "named" / "started").exists()
