"""What can be known of a checkpoint without loading it: from its directory, the hub's cache, or the bundled table."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from roll_r3.config.disk import is_directory, is_file, matches, read_at_most, unseen, why_no_file
from roll_r3.config.report import show_value
from roll_r3.errors import ConfigError
from roll_r3.models.architectures.base import RawConfig
from roll_r3.models.checkpoint import INDEX, cached_file, is_hub_name, read_index
from roll_r3.models.facts import MAX_CONFIG, ModelFacts, facts_of
from roll_r3.models.known import known_config

_TOKENIZERS = ("tokenizer.json", "tokenizer_config.json", "vocab.json", "*.model")
"""What a tokenizer is made from: a file of its own, or code that comes with the checkpoint."""


@dataclass(frozen=True)
class Model:
    """A checkpoint as its config.json describes it."""

    raw: RawConfig
    """config.json as it was written."""
    source: str
    """Where that was read."""
    facts: ModelFacts | None
    """None: roll_r3 does not know the architecture."""
    reason: str = ""
    """Why there are no facts."""

    @classmethod
    def of(cls, raw: RawConfig, source: str) -> Model:
        """Read the facts of a config.json, if they can be."""
        try:
            return cls(raw, source, facts_of(raw))
        except ConfigError as error:
            return cls(raw, source, None, str(error))


def find_model(name: str) -> Model | str:
    """What is known of a checkpoint; text: why its description cannot be read, empty when there is none here."""
    directory = Path(name)
    if is_directory(directory):
        return _read(directory / "config.json")
    if why := unseen(directory):
        return f"it cannot be looked at: {why}"
    if not is_hub_name(name):
        return "there is no such directory here (a name on the hub has the form owner/model)"
    known = known_config(name)
    if known is not None:
        return Model.of(known, source="the bundled table")
    cached = cached_file(name, "config.json")
    return "" if cached is None else _read(cached)


def incomplete(name: str) -> str:
    """What a checkpoint's directory lacks; empty for one that is complete, or that the hub would give."""
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
    return f"{directory} lacks {len(missing)} of its weight files, {show_value(missing[0])} among them"


def _read(path: Path) -> Model | str:
    if why := why_no_file(path):
        return f"{path} cannot be read: {why}"
    try:
        content: Any = json.loads(read_at_most(path, MAX_CONFIG).decode())
    except (OSError, ValueError, RecursionError):
        return f"{path} cannot be read"
    return Model.of(content, source=str(path)) if isinstance(content, dict) else f"{path} is not a JSON object"
