"""Hydra's `defaults:` list in ROLL's files. Includes are recognized by name; no file is read, and the numbers that they
define are known."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from roll_r3.config.findings.report import MAX_FINDINGS, Finding
from roll_r3.config.reading import interpolate
from roll_r3.config.translator import Tree
from roll_r3.config.tree import Keys, dotted, overlap, remove

DEEPSPEED = re.compile(r"deepspeed_zero\w*")
"""Includes for DeepSpeed strategies, and the blocks defined by them under the same names."""
_AGENTIC = re.compile(r"(\w+_)?envs(_gem_\w+)?")
"""Includes of environments, read by the agentic pipeline alone."""
_STEPS: dict[str, float] = {"max_tokens_per_step": 128, "max_actions_per_traj": 10}
_PENALTIES: dict[str, float] = {"sokoban_format_penalty": -0.15, "frozen_format_penalty": -0.01}
NUMBERS: dict[str, dict[str, float]] = {
    "traj_envs": _STEPS | _PENALTIES,
    "vl_traj_envs": _STEPS | _PENALTIES,
    "step_envs": _STEPS | _PENALTIES | {"sokoban_format_penalty": -0.05, "default_history_length": 5},
    **{f"traj_envs_gem_{kind}": _STEPS for kind in ("code", "games", "math", "qa", "rg")},
}
"""Include shipped with ROLL -> numbers defined by it at the root. Its other values belong to environments."""
_ENVIRONMENTS = re.compile(
    r"custom_env|gem_\w+|env_manager_cls|agent_runner_cls|default_history_length|max_(tokens_per_step|actions_per_traj)|"
    r"(\w+_)?(action|response)_pattern|\w+_format_penalty|(\w+_)?agent_(system_)?template|(pre|next)_step_template"
)
"""Root keys defined by these includes."""
_PATH = re.compile(r"\$\{([\w-]+(?:\.[\w-]+)*)")
"""Path inside an interpolation; a relative one begins with a dot."""
_HYDRA = re.compile(r"(override )?/?hydra/.*")
"""Options of Hydra itself."""
_SEARCHED = 1000
"""Number of characters of a value searched for interpolations."""


def resolve(data: dict[str, Any], places: dict[str, str]) -> Tree:
    """Replace the `defaults:` list and every `${...}`. A failure caused by a skipped include is reported with it.

    Args:
        data: the tree after overrides.
        places: dotted path -> where it was written.
    """
    included, places, unknown = include_defaults(data, places)
    numbers = _numbers(data)
    resolved, unresolved = interpolate.resolve(numbers | included, places)
    findings, unresolved, attributed = attribute_to_includes(resolved, data.get("defaults"), unknown, unresolved)
    resolved = {key: value for key, value in resolved.items() if key in included or key not in numbers}
    for keys in attributed:
        remove(resolved, keys)
    return Tree(resolved, places, tuple(findings), tuple(unresolved))


def include_defaults(
    data: dict[str, Any], places: dict[str, str]
) -> tuple[dict[str, Any], dict[str, str], list[Finding]]:
    """Replace the `defaults:` list by markers for its DeepSpeed includes.

    A marker stands under the name of its include, so `${deepspeed_zero3}` resolves; `translate` removes both.

    Args:
        data: the tree after overrides, before `${...}` is resolved.
        places: dotted path -> where it was written.

    Returns:
        The tree, the places with those of the markers, and an error for each unknown include.
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
            why = "roll_r3 reads one file, and does not know this include by name"
            fix = "replace it by the content of the included file"
            findings.append(Finding("roll-include", "error", ((path, entry),), why, fix))
    return included, places, findings


def _numbers(data: dict[str, Any]) -> dict[str, float]:
    """Return the numbers defined by ROLL's own includes, for `${...}` alone; the last include wins, as in Hydra."""
    entries = data.get("defaults")
    names = [_name(entry) for entry in entries] if isinstance(entries, list) else []
    return {key: value for name in names if name is not None for key, value in NUMBERS.get(name, {}).items()}


def attribute_to_includes(
    data: dict[str, Any], entries: object, unknown: list[Finding], unresolved: list[tuple[Keys, Finding]]
) -> tuple[list[Finding], list[tuple[Keys, Finding]], list[Keys]]:
    """Join interpolations that fail because of a skipped include to one error about the includes.

    Args:
        data: the tree after interpolation; a failed value is None.
        entries: the `defaults:` list; any other type includes nothing.
        unknown: the findings of `include_defaults`.
        unresolved: the findings of interpolation, and where their values are.

    Returns:
        The findings about includes, the rest of `unresolved`, and the keys of the values reported with an include.
    """
    skipped = _skipped(entries)
    if not skipped or len(unresolved) > MAX_FINDINGS:  # the file is rejected anyway
        return unknown, unresolved, []

    def reads(text: str, through: Sequence[str]) -> bool:
        for path in _PATH.findall(text[:_SEARCHED]):
            root = path.partition(".")[0]
            if any(overlap(path, other) for other in through) or (root not in data and _may_define(skipped, root)):
                return True
        return False

    attributed: dict[Keys, Finding] = {}
    through: list[str] = []
    while True:  # a value that reads a failed one fails too
        rest = [(keys, finding) for keys, finding in unresolved if keys not in attributed]
        latest = {keys: finding for keys, finding in rest if reads(str(finding.found[0][1]), through)}
        if not latest:
            break
        attributed |= latest
        through = [dotted(keys) for keys in latest]
    if not attributed:
        return unknown, unresolved, []
    names = ", ".join(str(entry) for _, entry in skipped)
    why = f"these ${{...}} read values defined by {names}, and roll_r3 reads one file: includes are skipped"
    fix = "copy these values from the included file into this one"
    found = (*skipped, *(item for finding in attributed.values() for item in finding.found))
    return [Finding("roll-include", "error", found, why, fix)], rest, list(attributed)


def _skipped(entries: object) -> list[tuple[str, object]]:
    """Return (dotted path, entry) of each skipped include."""
    return [
        (dotted(("defaults", index)), entry)
        for index, entry in enumerate(entries if isinstance(entries, list) else [])
        if (name := _name(entry)) is None
        or not (name == "_self_" or DEEPSPEED.fullmatch(name) or _HYDRA.fullmatch(name))
    ]


def _may_define(skipped: list[tuple[str, object]], root: str) -> bool:
    """Return true if a skipped include can define a root key. The keys of ROLL's own includes are known."""
    known = [(name := _name(entry)) is not None and _AGENTIC.fullmatch(name) is not None for _, entry in skipped]
    return not all(known) or (bool(known) and _ENVIRONMENTS.fullmatch(root) is not None)


def _name(entry: object) -> str | None:
    """Return the name of an include: deepspeed_zero3 for `../config/deepspeed_zero3@_here_`; None: not an include."""
    if isinstance(entry, dict) and len(entry) == 1:
        option = str(next(iter(entry)))
        return option if _HYDRA.fullmatch(option) else None
    if not isinstance(entry, str):
        return None
    path = entry.strip().partition("@")[0]
    return path if _HYDRA.fullmatch(path) else path.rpartition("/")[2].removesuffix(".yaml")
