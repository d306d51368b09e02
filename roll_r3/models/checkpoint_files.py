"""Checkpoints and their files: a directory, or a name on the Hugging Face hub."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path, PurePath
from typing import Any

from roll_r3.config.findings.readable import readable
from roll_r3.config.findings.report import show_value
from roll_r3.config.reading.disk import is_directory, is_file, read_at_most
from roll_r3.errors import ConfigError

_REPOSITORY = re.compile(r"\b[\w.-]{1,96}\b/\b[\w.-]{1,96}\b", re.ASCII)
INDEX = "model.safetensors.index.json"
MAX_INDEX = 256 << 20
"""Maximum bytes of an index; a large model's index has a few million."""
_MAX_COMMIT = 256
"""Maximum characters read from a ref; a commit has 40."""


def resolve_checkpoint(name: str) -> Path:
    """Return the checkpoint's directory; a hub name is downloaded to (or found in) the hub's cache.

    Raises:
        ConfigError: neither a directory with a config.json nor an available name on the hub.
    """
    path = Path(name)
    if is_directory(path):
        if not is_file(path / "config.json"):
            raise ConfigError(f"checkpoint {name!r}: the directory has no config.json")
        return path
    if not is_hub_name(name):
        raise ConfigError(f"checkpoint {name!r}: no such directory (a hub name has the form owner/model)")
    from huggingface_hub import snapshot_download  # noqa: PLC0415  only needed for hub names
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError  # noqa: PLC0415

    try:
        return Path(snapshot_download(name, ignore_patterns=["*.bin", "*.pth", "original/*"]))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise ConfigError(
            f"checkpoint {name!r} is not a directory, and cannot be downloaded from the hub: {error}"
        ) from error


def safetensors_files(directory: Path) -> list[Path]:
    """Return the weight files of a checkpoint, sorted by name.

    Raises:
        ConfigError: there are none.
    """
    files = sorted(directory.glob("*.safetensors"))
    if not files:
        raise ConfigError(f"{directory} holds no *.safetensors: convert the checkpoint first")
    return files


def tensor_files(directory: Path) -> dict[str, str]:
    """Return tensor name -> file of a checkpoint, from the index if there is one.

    Files outside the index may hold the same weights under other names.

    Raises:
        ConfigError: a directory without safetensors, or see `read_index`.
    """
    index = directory / INDEX
    if is_file(index):
        return read_index(index)
    from safetensors import safe_open  # noqa: PLC0415  a base installation, which only checks, does without

    files: dict[str, str] = {}
    for file in safetensors_files(directory):
        with safe_open(file, framework="pt") as tensors:
            files |= dict.fromkeys(tensors.keys(), file.name)
    return files


def read_index(index: Path) -> dict[str, str]:
    """Return tensor name -> name of a file in the directory of the index. The file may be missing.

    Raises:
        ConfigError: the index cannot be read or is invalid.
    """
    try:
        said: Any = json.loads(read_at_most(index, MAX_INDEX).decode())
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"{index} cannot be read: {readable(error)}") from error
    files = said.get("weight_map") if isinstance(said, dict) else None
    if not isinstance(files, dict):
        raise ConfigError(f"{index} has no weight_map from tensors to files")
    for tensor, name in files.items():
        if not isinstance(name, str) or not _is_plain(name):
            raise ConfigError(
                f"{index}: the file of {show_value(tensor)} must be a name in this directory, got {show_value(name)}"
            )
    return files


def own_file(directory: Path, name: str) -> Path | None:
    """Return the real path of a checkpoint's file; None if a link leads out of the checkpoint.

    The files of a snapshot in the hub's cache are links to the blobs of their repository.
    """
    path, home = Path(os.path.realpath(directory / name)), Path(os.path.realpath(directory))
    homes = [home]
    if home.parent.name == "snapshots" and home.parent.parent.name.startswith("models--"):
        homes.append(home.parent.parent / "blobs")
    return path if any(path.is_relative_to(own) for own in homes) else None


def _is_plain(name: str) -> bool:
    """Return True for a plain file name, without a way into another directory."""
    return name not in ("", "..") and PurePath(name).name == name and name.isprintable()


def is_hub_name(name: str) -> bool:
    """Return True if `name` has the form of a repository on the Hugging Face hub, owner/model."""
    return (
        _REPOSITORY.fullmatch(name) is not None
        and not any(pair in name for pair in ("--", ".."))
        and not name.endswith(".git")
    )


def cached_file(name: str, file: str) -> Path | None:
    """Return a file of a hub repository from the hub's cache on this machine, without a download.

    The layout of the cache is read directly. Importing the hub's client takes longer than the rest of a check, and a
    base installation does not have it.
    """
    repository = hub_cache() / f"models--{name.replace('/', '--')}"
    ref = repository / "refs" / "main"
    if not is_file(ref):
        return None
    try:
        with ref.open() as stream:
            commit = stream.read(_MAX_COMMIT)
    except (OSError, ValueError):
        return None
    path = repository / "snapshots" / commit / file
    return path if commit and is_file(path) else None


def hub_cache() -> Path:
    """Return the hub's cache directory, from the environment variables of the hub's client, in its order."""
    caches = os.environ.get("XDG_CACHE_HOME", os.path.join(os.path.expanduser("~"), ".cache"))
    home = _expanded(os.environ.get("HF_HOME", os.path.join(caches, "huggingface")))
    older = os.environ.get("HUGGINGFACE_HUB_CACHE", os.path.join(home, "hub"))
    return Path(_expanded(os.environ.get("HF_HUB_CACHE", older)))


def _expanded(path: str) -> str:
    return os.path.expandvars(os.path.expanduser(path))
