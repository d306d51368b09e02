"""Installed releases of the engines, read from package metadata.

No interpreter is started and nothing is imported: a configuration under check may name any program as `python`.
"""

from __future__ import annotations

import os
import re
import shutil
import sys
from collections.abc import Sequence
from importlib.metadata import distributions
from pathlib import Path

from roll_r3.config.derived import changed, megatron_workers, sglang, vllm
from roll_r3.config.pipeline import RLVRConfig
from roll_r3.config.reading.disk import is_file, matches
from roll_r3.config.rules.paths import ENGINE


def find_interpreter(python: str) -> Path | None:
    """Return the executable for `python`, a path or a name on PATH; None if there is none."""
    try:
        found = shutil.which(python)
    except (OSError, ValueError):
        return None
    return None if found is None else Path(found).absolute()


def find_versions(config: RLVRConfig) -> dict[str, str | None]:
    """Return package -> installed release for every engine in use; None: not installed. Unknown ones are left out."""
    found: dict[str, str | None] = {}
    if (on_sglang := sglang(config)) is not None:
        found |= _versions_for(on_sglang.python, "sglang", os.environ.get("PYTHONPATH", ""))
    if (on_vllm := vllm(config)) is not None:
        not_made = {} if changed(config, f"{ENGINE}.python") else {"vllm": None}
        found |= _versions_for(on_vllm.python, "vllm", "") or not_made  # its server inherits no PYTHONPATH
    if megatron_workers(config):
        found["megatron-core"] = release("megatron-core")
    return found


def _versions_for(python: str | None, package: str, path: str) -> dict[str, str | None]:
    """Return `find_versions` for one package; `python` None is this interpreter."""
    if python is None:
        return {package: release(package)}
    interpreter = find_interpreter(python)
    return {} if interpreter is None else versions_beside(interpreter, package, path)


def versions_beside(python: Path, package: str, path: str = "") -> dict[str, str | None]:
    """Return {package: release} in the package folders of another interpreter.

    A missing package is {package: None} in a virtual environment with its own packages only, else {}: another folder
    may have it.

    Args:
        path: PYTHONPATH of the interpreter.
    """
    folders = [Path(folder) for folder in path.split(os.pathsep) if folder]
    settings = _environment_settings(python)
    closed = settings is not None and settings.get("include-system-site-packages", "").lower() != "true"
    base = python
    if settings is not None:
        folders += matches(python.parent.parent, "lib/python3*/*-packages")
        base = Path(settings.get("home", "")) / os.path.basename(os.path.realpath(python))
    if not closed:
        folders += _system_folders(base)
    found = release(package, folders)
    return {package: found} if found is not None or (closed and not path) else {}


def release(package: str, folders: Sequence[Path] | None = None) -> str | None:
    """Return the release of the first installation in `folders`, by default on the import path."""
    path = sys.path if folders is None else [str(folder) for folder in folders]
    return next((found.version for found in distributions(name=package, path=path)), None)


def _system_folders(python: Path) -> list[Path]:
    """Return the package folders of an interpreter outside virtual environments, the user's own first."""
    real = Path(os.path.realpath(python))
    release = re.fullmatch(r"python3\.\d+", real.name)
    prefixes = dict.fromkeys((python.parent.parent, real.parent.parent))
    roots = [Path(os.path.expanduser("~/.local")), *(root for p in prefixes for root in (p / "local", p))]
    names = (release[0] if release else "python3*", "python3")  # the last one is Debian's
    return [folder for root in roots for name in names for folder in matches(root, f"lib/{name}/*-packages")]


def _environment_settings(python: Path) -> dict[str, str] | None:
    """Read pyvenv.cfg of the virtual environment of `python`; None outside of one."""
    for folder in (python.parent, python.parent.parent):
        if is_file(folder / "pyvenv.cfg"):
            try:
                lines = (folder / "pyvenv.cfg").read_text().splitlines()
            except (OSError, ValueError):
                return None
            pairs = (line.partition("=") for line in lines)
            return {key.strip().lower(): value.strip() for key, _, value in pairs}
    return None
