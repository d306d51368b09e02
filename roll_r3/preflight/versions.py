"""Installed releases of the engines, by their metadata: nothing is imported."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, distributions, version
from pathlib import Path

from roll_r3.config.derived import megatron_workers, sglang
from roll_r3.config.pipeline import RLVRConfig


def find_versions(config: RLVRConfig) -> dict[str, str | None]:
    """Package -> installed release (None: not installed) of every engine that the configuration uses."""
    found: dict[str, str | None] = {}
    server = sglang(config)
    if server is not None and server.python is None:
        found["sglang"] = _installed("sglang")
    elif server is not None and server.python is not None and Path(server.python).is_file():
        found["sglang"] = _installed_for(Path(server.python), "sglang")
    if megatron_workers(config):
        found["megatron-core"] = _installed("megatron-core")
    return found


def _installed(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _installed_for(python: Path, package: str) -> str | None:
    """The release beside another interpreter, `<environment>/bin/python`."""
    libraries = [str(path) for path in python.absolute().parent.parent.glob("lib/python3*/site-packages")]
    return next((found.version for found in distributions(name=package, path=libraries)), None)
