"""Finding a checkpoint: a directory, or a name on the Hugging Face hub."""

from __future__ import annotations

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
    if path.is_absolute() or name.startswith(".") or name.count("/") != 1:
        raise ConfigError(f"checkpoint {name!r}: no such directory (a hub name has the form owner/model)")
    from huggingface_hub import snapshot_download  # noqa: PLC0415  only needed for hub names
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError  # noqa: PLC0415

    try:
        return Path(snapshot_download(name, ignore_patterns=["*.bin", "*.pth", "original/*"]))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise ConfigError(f"checkpoint {name!r} is no directory here, and the hub does not give it: {error}") from error
