"""Hydra's `defaults:` list in ROLL's files: includes that are known by name. No file is read."""

from __future__ import annotations

import re
from typing import Any

from roll_r3.config.report import Finding
from roll_r3.config.tree import dotted

DEEPSPEED = re.compile(r"deepspeed_zero\w*")
"""Includes that define the block of their own name, for DeepSpeed strategies; and those blocks."""
_AGENTIC = re.compile(r"(\w+_)?envs")
"""Includes that define environments, which the agentic pipeline alone reads."""
_HYDRA = re.compile(r"(override )?/?hydra/.*")
"""Options of Hydra itself."""


def include_defaults(
    data: dict[str, Any], places: dict[str, str]
) -> tuple[dict[str, Any], dict[str, str], list[Finding]]:
    """The tree without its `defaults:` list, but with what the list includes as far as that is known by name.

    A DeepSpeed include becomes a marker under its name, so that `${deepspeed_zero3}` resolves; `translate` takes both
    away again.

    Args:
        data: the tree after overrides, before `${...}` is resolved.
        places: dotted path -> where it was written.

    Returns:
        The tree, the places with those of the markers, and an error for each include that is not known.
    """
    entries = data.get("defaults")
    if not isinstance(entries, list):
        return data, places, []
    included, places = {k: v for k, v in data.items() if k != "defaults"}, dict(places)
    findings = []
    for index, entry in enumerate(entries):
        path = dotted(("defaults", index))
        name = _name(entry)
        if name is not None and DEEPSPEED.fullmatch(name):
            if name not in included:
                included[name] = {"include": name}
                places |= {name: places[path]} if path in places else {}
        elif name is None or not (name == "_self_" or _AGENTIC.fullmatch(name) or _HYDRA.fullmatch(name)):
            why = "roll_r3 reads one file, and what this include says is not known by its name"
            fix = "paste the included file's content in its place"
            findings.append(Finding("roll-include", "error", ((path, entry),), why, fix))
    return included, places, findings


def _name(entry: object) -> str | None:
    """What an entry includes: `../config/deepspeed_zero3@_here_` is deepspeed_zero3; None: it is no include."""
    if isinstance(entry, dict) and len(entry) == 1:
        option = str(next(iter(entry)))
        return option if _HYDRA.fullmatch(option) else None
    if not isinstance(entry, str):
        return None
    path = entry.strip().partition("@")[0]
    return path if _HYDRA.fullmatch(path) else path.rpartition("/")[2].removesuffix(".yaml")
