"""Finding a checkpoint: a directory, or a name on the Hugging Face hub."""

from __future__ import annotations

import re
from pathlib import Path

from roll_r3.errors import ConfigError


def resolve_checkpoint(name: str) -> Path:
    """The checkpoint's directory; a hub name is downloaded to (or found in) the hub's cache.

    Raises:
        ConfigError: neither a directory with a config.json nor a name that the hub serves.
    """
    path = Path(name)
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise ConfigError(f"checkpoint {name!r}: the directory holds no config.json")
        return path
    if not is_hub_name(name):
        raise ConfigError(f"checkpoint {name!r}: no such directory (a hub name has the form owner/model)")
    from huggingface_hub import snapshot_download  # noqa: PLC0415  only needed for hub names
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError  # noqa: PLC0415

    try:
        return Path(snapshot_download(name, ignore_patterns=["*.bin", "*.pth", "original/*"]))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise ConfigError(f"checkpoint {name!r} is no directory here, and the hub does not give it: {error}") from error


def is_hub_name(name: str) -> bool:
    """Whether `name` has the form of a repository on the Hugging Face hub, owner/model."""
    return re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", name) is not None


def cached_file(name: str, file: str) -> Path | None:
    """A file of a hub repository that is already in the hub's cache on this machine; nothing is downloaded."""
    from huggingface_hub import try_to_load_from_cache  # noqa: PLC0415  only needed for hub names

    found = try_to_load_from_cache(name, file)
    return Path(found) if isinstance(found, str) else None
