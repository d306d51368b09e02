"""Hydra's `defaults:` list in ROLL's files: includes that are known by name. No file is read."""

from __future__ import annotations

import re
from typing import Any

from roll_r3.config.report import Finding
from roll_r3.config.tree import Keys, dotted, overlap

DEEPSPEED = re.compile(r"deepspeed_zero\w*")
"""Includes that define the block of their own name, for DeepSpeed strategies; and those blocks."""
_AGENTIC = re.compile(r"(\w+_)?envs(_gem_\w+)?")
"""Includes that define environments, which the agentic pipeline alone reads."""
_ENVIRONMENTS = re.compile(
    r"custom_env|gem_\w+|env_manager_cls|agent_runner_cls|default_history_length|max_(tokens_per_step|actions_per_traj)|"
    r"(\w+_)?(action|response)_pattern|\w+_format_penalty|(\w+_)?agent_(system_)?template|(pre|next)_step_template"
)
"""Root keys that they define."""
_PATH = re.compile(r"\$\{([\w-]+(?:\.[\w-]+)*)")
"""The path that an interpolation reads; a relative one begins with a dot."""
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


def blame_includes(
    data: dict[str, Any], entries: object, unknown: list[Finding], unresolved: list[tuple[Keys, Finding]]
) -> tuple[list[Finding], list[tuple[Keys, Finding]], list[Keys]]:
    """Interpolations that fail because of an include which is not read, as one error with it.

    Args:
        data: the tree after interpolation, in which what failed is None.
        entries: the `defaults:` list; anything else includes nothing.
        unknown: the findings of `include_defaults`.
        unresolved: what `resolve` could not resolve.

    Returns:
        The findings about includes, the rest of `unresolved`, and the keys of what is reported with an include.
    """
    skipped = _skipped(entries)
    blamed: dict[Keys, Finding] = {}
    for _ in unresolved:  # what reads a value that fails fails with it
        through = [dotted(keys) for keys in blamed]
        for keys, finding in unresolved:
            for path in _PATH.findall(str(finding.found[0][1])):
                root = path.partition(".")[0]
                if any(overlap(path, other) for other in through) or (root not in data and _may_define(skipped, root)):
                    blamed[keys] = finding
        if len(through) == len(blamed):
            break
    if not blamed:
        return unknown, unresolved, []
    names = ", ".join(str(entry) for _, entry in skipped)
    why = f"these ${{...}} read what {names} would define, and roll_r3 reads one file: includes are skipped"
    fix = "paste what they read from the included file into this one, or write the values"
    found = (*skipped, *(item for finding in blamed.values() for item in finding.found))
    rest = [(keys, finding) for keys, finding in unresolved if keys not in blamed]
    return [Finding("roll-include", "error", found, why, fix)], rest, list(blamed)


def _skipped(entries: object) -> list[tuple[str, object]]:
    """(dotted path, entry) of the includes that are not read."""
    return [
        (dotted(("defaults", index)), entry)
        for index, entry in enumerate(entries if isinstance(entries, list) else [])
        if (name := _name(entry)) is None
        or not (name == "_self_" or DEEPSPEED.fullmatch(name) or _HYDRA.fullmatch(name))
    ]


def _may_define(skipped: list[tuple[str, object]], root: str) -> bool:
    """Return true if a skipped include can define a root key. The keys of those that ROLL ships are known."""
    known = [(name := _name(entry)) is not None and _AGENTIC.fullmatch(name) is not None for _, entry in skipped]
    return not all(known) or (bool(known) and _ENVIRONMENTS.fullmatch(root) is not None)


def _name(entry: object) -> str | None:
    """What an entry includes: `../config/deepspeed_zero3@_here_` is deepspeed_zero3; None: it is no include."""
    if isinstance(entry, dict) and len(entry) == 1:
        option = str(next(iter(entry)))
        return option if _HYDRA.fullmatch(option) else None
    if not isinstance(entry, str):
        return None
    path = entry.strip().partition("@")[0]
    return path if _HYDRA.fullmatch(path) else path.rpartition("/")[2].removesuffix(".yaml")
