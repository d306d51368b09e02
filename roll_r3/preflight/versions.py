"""Installed releases of the engines, by their metadata: nothing is imported and nothing is run."""

from __future__ import annotations

import os
import re
import shutil
from importlib.metadata import PackageNotFoundError, distributions, version
from pathlib import Path

from roll_r3.config.derived import changed, megatron_workers, sglang, vllm
from roll_r3.config.disk import is_file, matches
from roll_r3.config.pipeline import RLVRConfig
from roll_r3.config.rules.paths import ENGINE

_PACKAGES = ("site-packages", "dist-packages")


def find_interpreter(python: str) -> Path | None:
    """The interpreter that `python`, a path or a name on PATH, starts; None: there is none that can be run."""
    try:
        found = shutil.which(python)
    except (OSError, ValueError):
        return None
    return None if found is None else Path(found).absolute()


def find_versions(config: RLVRConfig) -> dict[str, str | None]:
    """Package -> installed release (None: not installed) of every engine that the configuration uses; without what
    cannot be told."""
    found: dict[str, str | None] = {}
    if (on_sglang := sglang(config)) is not None:
        found |= _versions_for(on_sglang.python, "sglang", os.environ.get("PYTHONPATH", ""))
    if (on_vllm := vllm(config)) is not None:
        nowhere = {} if changed(config, f"{ENGINE}.python") else {"vllm": None}
        found |= _versions_for(on_vllm.python, "vllm", "") or nowhere  # its server inherits no path
    if megatron_workers(config):
        found["megatron-core"] = _installed("megatron-core")
    return found


def _versions_for(python: str | None, package: str, path: str) -> dict[str, str | None]:
    """What `find_versions` says of one package.

    Args:
        python: the interpreter that is to have it; None: this one.
        path: the PYTHONPATH that it starts with.
    """
    if python is None:
        return {package: _installed(package)}
    interpreter = find_interpreter(python)
    if interpreter is None:
        return {}
    release = installed_for(interpreter, package, path)
    return {package: release} if release is not None or is_isolated(interpreter, path) else {}


def _installed(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def installed_for(python: Path, package: str, path: str = "") -> str | None:
    """The release that another interpreter would import; None: none is found where its packages usually are.

    Args:
        path: the PYTHONPATH that it starts with.
    """
    folders = [str(folder) for folder in _package_folders(python, path)]
    return next((found.version for found in distributions(name=package, path=folders)), None)


def is_isolated(python: Path, path: str = "") -> bool:
    """Whether an interpreter sees the packages of its own environment and no others.

    Args:
        path: the PYTHONPATH that it starts with.
    """
    settings = _environment_settings(python)
    return settings is not None and not _sees_system(settings) and not path


def _package_folders(python: Path, path: str) -> list[Path]:
    """Where `python` looks for packages, as far as the layout of its installation says, the nearest first."""
    named = [Path(folder) for folder in path.split(os.pathsep) if folder]
    settings = _environment_settings(python)
    if settings is None:
        return named + _system_folders(python)
    own = _below(python.parent.parent, "python3*")
    if not _sees_system(settings):
        return named + own
    home = Path(settings.get("home", ""))
    return named + own + _system_folders(home / os.path.basename(os.path.realpath(python)))


def _system_folders(python: Path) -> list[Path]:
    """The package folders of an interpreter outside of any environment, the user's own first."""
    real = Path(os.path.realpath(python))
    release = re.fullmatch(r"python3\.\d+", real.name)
    versioned = release[0] if release else "python3*"
    prefixes = dict.fromkeys((python.parent.parent, real.parent.parent))
    roots = [Path(os.path.expanduser("~/.local")), *(root for p in prefixes for root in (p / "local", p))]
    return [
        folder
        for root in roots
        for pattern in dict.fromkeys((versioned, "python3"))
        for folder in _below(root, pattern)
    ]


def _below(root: Path, pattern: str) -> list[Path]:
    return [folder for name in _PACKAGES for folder in matches(root, f"lib/{pattern}/{name}")]


def _environment_settings(python: Path) -> dict[str, str] | None:
    """What pyvenv.cfg says of the virtual environment that `python` belongs to; None: it belongs to none."""
    for folder in (python.parent, python.parent.parent):
        path = folder / "pyvenv.cfg"
        if is_file(path):
            try:
                lines = path.read_text().splitlines()
            except (OSError, ValueError):
                return None
            pairs = (line.partition("=") for line in lines)
            return {key.strip().lower(): value.strip() for key, _, value in pairs}
    return None


def _sees_system(settings: dict[str, str]) -> bool:
    return settings.get("include-system-site-packages", "").lower() == "true"
