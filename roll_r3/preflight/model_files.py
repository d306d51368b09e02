"""Facts about a checkpoint without loading it: from its directory, the hub's cache, or the bundled table."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from roll_r3.config.findings.report import show_value
from roll_r3.config.reading.disk import is_directory, is_file, matches, read_at_most, why_no_file, why_unknown
from roll_r3.errors import ConfigError
from roll_r3.models.architectures.base import RawConfig
from roll_r3.models.checkpoint_files import INDEX, cached_file, is_hub_name, read_index
from roll_r3.models.facts import MAX_CONFIG, ModelFacts, facts_of
from roll_r3.models.known import known_config

_TOKENIZERS = ("tokenizer.json", "tokenizer_config.json", "vocab.json", "*.model")
"""Files of a tokenizer; one of them is enough. tokenizer_config.json may refer to code of the checkpoint."""


@dataclass(frozen=True)
class Model:
    """Checkpoint as described by its config.json."""

    raw: RawConfig
    """config.json as written."""
    source: str
    """Source of `raw`, for messages."""
    facts: ModelFacts | None
    """None for an unknown architecture."""
    reason: str = ""
    """Reason for missing facts."""

    @classmethod
    def of(cls, raw: RawConfig, source: str) -> Model:
        """Read the facts of a config.json, if possible."""
        try:
            return cls(raw, source, facts_of(raw))
        except ConfigError as error:
            return cls(raw, source, None, str(error))


def find_model(name: str) -> Model | str:
    """Find the model of a checkpoint; text: why it cannot be read, empty if it is unknown on this machine."""
    directory = Path(name)
    if is_directory(directory):
        return _read(directory / "config.json")
    if why := why_unknown(directory):
        return f"it cannot be read: {why}"
    if not is_hub_name(name):
        return "there is no such directory (a name on the hub has the form owner/model)"
    known = known_config(name)
    if known is not None:
        return Model.of(known, source="the bundled table")
    cached = cached_file(name, "config.json")
    return "" if cached is None else _read(cached)


def incomplete(name: str) -> str:
    """Return the missing part of a checkpoint's directory; empty if complete, or on the hub."""
    directory = Path(name)
    if not is_directory(directory):
        return ""
    if not any(is_file(path) for pattern in _TOKENIZERS for path in matches(directory, pattern)):
        return f"{directory} holds no tokenizer ({', '.join(_TOKENIZERS)})"
    tokenizer = directory / "tokenizer.json"
    if is_file(tokenizer) and not tokenizer.stat().st_size:
        return f"{tokenizer} is empty"
    index = directory / INDEX
    if not is_file(index):
        return "" if matches(directory, "*.safetensors") else f"{directory} holds no *.safetensors"
    try:
        parts = set(read_index(index).values())
    except ConfigError as error:
        return str(error)
    missing = sorted(part for part in parts if not is_file(directory / part))
    if not missing:
        return ""
    return f"{directory} lacks {len(missing)} of its weight files, for example {show_value(missing[0])}"


def _read(path: Path) -> Model | str:
    if why := why_no_file(path):
        return f"{path} cannot be read: {why}"
    try:
        content: Any = json.loads(read_at_most(path, MAX_CONFIG).decode())
    except (OSError, ValueError, RecursionError):
        return f"{path} cannot be read"
    return Model.of(content, source=str(path)) if isinstance(content, dict) else f"{path} is not a JSON object"
