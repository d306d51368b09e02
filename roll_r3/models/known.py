"""config.json of well-known checkpoints, for a machine that holds no copy of them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import cache
from pathlib import Path

from roll_r3.models.architectures.base import RawConfig


def known_config(name: str) -> RawConfig | None:
    """What the config.json of a checkpoint on the Hugging Face hub says of its sizes and its routing; None: not known.

    Dense models are among them too, so that one can be refused by name.
    """
    return known_configs().get(name)


@cache
def known_configs() -> Mapping[str, RawConfig]:
    """All of them, by `owner/model`."""
    entries = json.loads(Path(__file__).with_name("known.json").read_text())
    return {name: entry["config"] for entry in entries for name in entry["names"]}
