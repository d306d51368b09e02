"""config.json of well-known checkpoints, for machines without a copy of them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import cache
from pathlib import Path

from roll_r3.models.architectures.base import RawConfig


def known_config(name: str) -> RawConfig | None:
    """Return sizes and routing from the config.json of a checkpoint on the Hugging Face hub; None if unknown.

    The table has dense models too, to reject them by name.
    """
    return known_configs().get(name)


@cache
def known_configs() -> Mapping[str, RawConfig]:
    """Return all known checkpoints, by `owner/model`."""
    entries = json.loads(Path(__file__).with_name("known.json").read_text())
    return {name: entry["config"] for entry in entries for name in entry["names"]}
