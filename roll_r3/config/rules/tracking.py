"""Trackers and their arguments. A message never shows a value of `tracker_kwargs`: it may be a key."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from roll_r3.config.pipeline import RLVRConfig
from roll_r3.config.rules.table import AnyRule, Rule, Verdict
from roll_r3.config.tree import join

_SECRET_NAME = re.compile(
    r"api_?key|(^|_)(key|token|secret|password|passwd|login(_kwargs)?|credentials?)$", re.IGNORECASE
)
_SECRET_VALUE = re.compile(r"[0-9a-fA-F]{40}|(hf_|sk-|wandb_v\d_)\S{16,}|\w+://[^/\s:@]*:[^/\s@]+@\S*")
"""Forms of keys: of W&B, the hub and others; or a URL with a password."""


def _secrets(node: Any, path: str = "") -> Iterator[str]:
    """Yield dotted paths of keys, known by their name or their form."""
    if isinstance(node, dict):
        for name, value in node.items():
            inner = join(path, str(name))
            if _SECRET_NAME.search(str(name)) and value not in (None, ""):
                yield inner
            else:
                yield from _secrets(value, inner)
    elif isinstance(node, list | tuple):
        for number, value in enumerate(node):
            yield from _secrets(value, join(path, str(number)))
    elif isinstance(node, str) and _SECRET_VALUE.fullmatch(node):
        yield path


def _keys(config: RLVRConfig) -> Verdict:
    return ", ".join(f"tracker_kwargs.{path}" for path in _secrets(config.tracker_kwargs))


def _unread_kwargs(config: RLVRConfig) -> Verdict:
    return ", ".join(f"tracker_kwargs.{name}" for name in config.tracker_kwargs if name not in config.track_with)


RULES: tuple[AnyRule, ...] = (
    Rule(
        id="tracker-keys-elsewhere",
        fields=("track_with",),
        depends=("tracker_kwargs",),
        why="the configuration is printed and saved, so it must hold no key",
        fix="remove it, and set the library's own variable: WANDB_API_KEY, SWANLAB_API_KEY, HF_TOKEN, "
        "MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD",
        wrong=("track_with=[wandb]", "tracker_kwargs={wandb: {api_key: abc}}"),
        right=("track_with=[wandb]", "tracker_kwargs={wandb: {project: demo, tags: [moe]}}"),
        violates=_keys,
    ),
    Rule(
        id="tracker-arguments-unread",
        fields=("track_with",),
        depends=("tracker_kwargs",),
        why="these arguments have no effect: they are written under the name of a tracker in track_with",
        fix="name the tracker in track_with, write the arguments under its name, or remove them",
        wrong=("track_with=[wandb]", "tracker_kwargs={project: {}}"),
        right=("track_with=[wandb]", "tracker_kwargs={wandb: {project: demo}}"),
        violates=_unread_kwargs,
    ),
    Rule(
        id="trackers-once",
        fields=("track_with",),
        why="a tracker named twice would record every step twice",
        fix="name each tracker once",
        wrong=("track_with=[tensorboard, tensorboard]",),
        right=("track_with=[tensorboard]",),
        violates=lambda c: len(set(c.track_with)) < len(c.track_with),
    ),
)
