"""Data files, reward functions and the output directory: whether they are there. Code is read, never run."""

from __future__ import annotations

import ast
import json
import os
import sys
from collections.abc import Iterator, Mapping
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path

from roll_r3.config.pipeline import RewardConfig
from roll_r3.config.rules.data import BUILT_IN_REWARDS, FUNCTION
from roll_r3.config.workers import DataArgs
from roll_r3.data.prompts import BUNDLED, READERS
from roll_r3.data.tiny_task import BUNDLED_TASKS

_MAX_ROW = 8 << 20
"""Bytes of a first row that are read to see its columns."""


def data_problems(args: DataArgs) -> Iterator[str]:
    """What is wrong with each source of prompts."""
    for name in (args.file_name,) if isinstance(args.file_name, str) else args.file_name:
        if name and (problem := _source_problem(name, args)):
            yield problem


def _source_problem(name: str, args: DataArgs) -> str:
    if name.startswith(BUNDLED):
        known = ", ".join(BUNDLED + task for task in sorted(BUNDLED_TASKS))
        return "" if name.removeprefix(BUNDLED) in BUNDLED_TASKS else f"{name} is not one of {known}"
    path = Path(name)
    if path.suffix not in READERS:
        return f"{name} is not a {', '.join(READERS)} file"
    try:
        with path.open("rb") as stream:
            first = stream.readline(_MAX_ROW)
    except (OSError, ValueError) as error:
        return f"{name} cannot be read: {getattr(error, 'strerror', None) or error}"
    if not first:
        return f"{name} is empty"
    return _column_problem(name, first, args) if path.suffix == ".jsonl" else ""


def _column_problem(name: str, first: bytes, args: DataArgs) -> str:
    try:
        row = json.loads(first)
    except (ValueError, RecursionError):
        return f"the first line of {name} is not JSON"
    if not isinstance(row, dict):
        return f"the first line of {name} is not a JSON object"
    columns = (args.messages or args.prompt, args.ground_truth, args.domain, args.id)
    missing = [column for column in columns if column and column not in row]
    return f"{name} has no column {', '.join(missing)}; it has {', '.join(map(str, row))}" if missing else ""


def reward_problems(rewards: Mapping[str, RewardConfig]) -> Iterator[str]:
    """Why each reward function that is not built in cannot be found."""
    for config in rewards.values():
        if config.reward in BUILT_IN_REWARDS or not FUNCTION.fullmatch(config.reward):
            continue  # not a function of the user's, or a rule of its own
        module, _, function = config.reward.partition(":")
        if problem := _function_problem(module, function):
            yield f"{config.reward}: {problem}"


def _function_problem(module: str, function: str) -> str:
    """Why `module:function` is not there, as far as its source says without being run."""
    spec = _find_module(module)
    if spec is None:
        return f"there is no module {module} on the import path"
    if spec.origin is None or not spec.origin.endswith(".py"):
        return ""  # compiled, or a namespace: only an import could tell
    try:
        tree = ast.parse(Path(spec.origin).read_bytes())
    except (OSError, SyntaxError, ValueError, RecursionError) as error:
        return f"{spec.origin} cannot be read: {error}"
    names = set(_top_names(tree))
    return "" if function in names or "*" in names else f"{spec.origin} defines no {function}"


def _find_module(name: str) -> ModuleSpec | None:
    """Where `import name` would look, packages on the way not imported."""
    path: list[str] | None = None
    spec = None
    parts = name.split(".")
    for end in range(1, len(parts) + 1):
        spec = _find_one(".".join(parts[:end]), path)
        if spec is None:
            return None
        path = list(spec.submodule_search_locations or ())
    return spec


def _find_one(name: str, path: list[str] | None) -> ModuleSpec | None:
    for finder in sys.meta_path if path is None else [PathFinder]:
        if (spec := finder.find_spec(name, path)) is not None:
            return spec
    return None


def _top_names(tree: ast.Module) -> Iterator[str]:
    """Names that a module binds at its top level; `*` when it takes over another's."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield node.name
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.id
        elif isinstance(node, ast.Import | ast.ImportFrom):
            yield from (alias.asname or alias.name.partition(".")[0] for alias in node.names)


def output_problem(output_dir: str) -> str:
    """Why runs cannot be written below `output_dir`; empty when they can."""
    path = Path(output_dir).absolute()
    try:
        there = next(folder for folder in (path, *path.parents) if folder.exists())
    except OSError as error:
        return str(error.strerror)
    if not there.is_dir():
        return f"{there} is not a directory"
    return "" if os.access(there, os.W_OK) else f"{there} cannot be written"
