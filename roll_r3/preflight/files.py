"""Data files, reward functions and the output directory: whether they are there. Code is read, never run."""

from __future__ import annotations

import ast
import json
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from importlib.machinery import ModuleSpec, PathFinder
from importlib.metadata import distributions
from inspect import Parameter, Signature
from pathlib import Path
from typing import BinaryIO

from roll_r3.config.disk import NOTHING, is_directory, unseen, why_no_file
from roll_r3.config.pipeline import RewardConfig
from roll_r3.config.rules.data import BUILT_IN_REWARDS, FUNCTION
from roll_r3.config.workers import DataArgs
from roll_r3.data.prompts import BUNDLED, READERS
from roll_r3.data.tiny_task import BUNDLED_TASKS
from roll_r3.errors import CheckpointError
from roll_r3.saving.manifest import MARKER
from roll_r3.saving.state import read_state
from roll_r3.saving.store import CHECKPOINTS, Store

_MAX_ROW = 8 << 20
"""Bytes of a first row that are read to see its columns; nothing is said about a longer one."""
_PARQUET = b"PAR1"


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
    if why := why_no_file(path):
        return f"{name} cannot be read: {why}"
    try:
        with path.open("rb") as stream:
            first = _first_row(stream) if path.suffix == ".jsonl" else stream.read(len(_PARQUET))
    except OSError as error:
        return f"{name} cannot be read: {error.strerror}"
    if not first:
        return f"{name} is empty"
    if path.suffix == ".jsonl":
        return "" if len(first) >= _MAX_ROW else _column_problem(name, first, args)
    return "" if first == _PARQUET else f"{name} is not a parquet file"


def _first_row(stream: BinaryIO) -> bytes:
    """The first line that is not blank, which is how `datasets` reads a .jsonl; cut at _MAX_ROW bytes."""
    return next((line for line in iter(lambda: stream.readline(_MAX_ROW), b"") if line.strip()), b"")


def _column_problem(name: str, first: bytes, args: DataArgs) -> str:
    try:
        row = json.loads(first)
    except (ValueError, RecursionError):
        return f"the first row of {name} is not JSON"
    if not isinstance(row, dict):
        return f"the first row of {name} is not a JSON object"
    columns = (args.messages or args.prompt, args.ground_truth, args.domain, args.id)
    missing = [column for column in columns if column and column not in row]
    return f"{name} has no column {', '.join(missing)}; it has {', '.join(map(str, row))}" if missing else ""


def reward_problems(rewards: Mapping[str, RewardConfig]) -> Iterator[str]:
    """Why each reward rule cannot be found, or not be called with its kwargs."""
    for config in rewards.values():
        if config.reward in BUILT_IN_REWARDS:
            problem = _built_in_problem(config)
        elif FUNCTION.fullmatch(config.reward):
            problem = _function_problem(config)
        else:
            continue  # a rule of its own says so
        if problem:
            yield f"{config.reward}: {problem}"


def _built_in_problem(config: RewardConfig) -> str:
    if config.kwargs:
        return f"it takes no kwargs, {', '.join(config.kwargs)} among them"
    if config.reward == "math" and not list(distributions(name="math-verify")):
        return "it needs the package math-verify, which is not installed"
    return ""


def _function_problem(config: RewardConfig) -> str:
    """Why `module:function` cannot be called, as far as its source says without being run."""
    module, _, name = config.reward.partition(":")
    spec = _find_module(module)
    if spec is None:
        return f"there is no module {module} on the import path"
    if spec.origin is None or not spec.origin.endswith(".py"):
        return ""  # compiled, or a namespace: only an import could tell
    try:
        tree = ast.parse(Path(spec.origin).read_bytes())
    except (OSError, SyntaxError, ValueError, RecursionError) as error:
        return f"{spec.origin} cannot be read: {error}"
    statements: dict[str, list[ast.stmt]] = {}
    for node in _top_statements(tree.body):
        for bound in _names(node):
            statements.setdefault(bound, []).append(node)
    if name not in statements:
        return "" if {"*", "__getattr__"} & set(statements) else f"{spec.origin} defines no {name}"
    [*others, last] = statements[name]
    if others or not isinstance(last, ast.FunctionDef) or last.decorator_list:
        return ""  # only the import could tell which, or what it is
    return _call_problem(last.args, config.kwargs)


def _call_problem(arguments: ast.arguments, kwargs: Mapping[str, object]) -> str:
    """Why a function with `arguments` cannot be called as a reward rule is."""
    try:
        _signature(arguments).bind("response", "ground_truth", **kwargs)
    except TypeError as error:
        return f"it cannot be called as rule(response, ground_truth, **kwargs): {error}"
    return ""


def _signature(arguments: ast.arguments) -> Signature:
    """The signature that a `def` with `arguments` has; of defaults only that there are some."""
    by_position = [
        *((arg, Parameter.POSITIONAL_ONLY) for arg in arguments.posonlyargs),
        *((arg, Parameter.POSITIONAL_OR_KEYWORD) for arg in arguments.args),
    ]
    first_default = len(by_position) - len(arguments.defaults)
    found = [
        Parameter(arg.arg, kind, default=Parameter.empty if i < first_default else None)
        for i, (arg, kind) in enumerate(by_position)
    ]
    if arguments.vararg:
        found.append(Parameter(arguments.vararg.arg, Parameter.VAR_POSITIONAL))
    for arg, default in zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True):
        found.append(Parameter(arg.arg, Parameter.KEYWORD_ONLY, default=Parameter.empty if default is None else None))
    if arguments.kwarg:
        found.append(Parameter(arguments.kwarg.arg, Parameter.VAR_KEYWORD))
    return Signature(found)


def _find_module(name: str) -> ModuleSpec | None:
    """Where `import name` would look, packages on the way not imported."""
    path: list[str] | None = None
    spec = None
    for part in name.split("."):
        # by its own name: of a folder without __init__.py importlib would look up the parent, which is not imported
        spec = _find_one(part, path)
        if spec is None:
            return None
        path = list(spec.submodule_search_locations or ())
    return spec


def _find_one(name: str, path: list[str] | None) -> ModuleSpec | None:
    for finder in sys.meta_path if path is None else [PathFinder]:
        if (spec := finder.find_spec(name, path)) is not None:
            return spec
    return None


def _top_statements(body: Sequence[ast.stmt]) -> Iterator[ast.stmt]:
    """The statements that may run when a module is imported, those inside functions and classes left out."""
    for node in body:
        yield node
        if isinstance(node, ast.If | ast.For | ast.While):
            yield from _top_statements([*node.body, *node.orelse])
        elif isinstance(node, ast.With):
            yield from _top_statements(node.body)
        elif isinstance(node, ast.Try | ast.TryStar):
            handled = [statement for handler in node.handlers for statement in handler.body]
            yield from _top_statements([*node.body, *handled, *node.orelse, *node.finalbody])
        elif isinstance(node, ast.Match):
            yield from _top_statements([statement for case in node.cases for statement in case.body])


def _names(node: ast.stmt) -> Iterator[str]:
    """Names that a statement by itself binds; `*` for those of another module."""
    targets: list[ast.expr] = []
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
        yield node.name
    elif isinstance(node, ast.Import | ast.ImportFrom):
        yield from (alias.asname or alias.name.partition(".")[0] for alias in node.names)
    elif isinstance(node, ast.Assign):
        targets = node.targets
    elif isinstance(node, ast.AnnAssign | ast.For):
        targets = [node.target]
    elif isinstance(node, ast.With):
        targets = [item.optional_vars for item in node.items if item.optional_vars]
    for target in targets:
        yield from (part.id for part in ast.walk(target) if isinstance(part, ast.Name))


def output_problem(output_dir: str, exp_name: str) -> str:
    """Why runs cannot be written to output_dir/exp_name; empty when they can."""
    path = Path(output_dir).absolute() / exp_name
    for folder in (path, *path.parents):
        if why := unseen(folder):
            return f"{folder}: {why}"
        if is_directory(folder):
            return "" if os.access(folder, os.W_OK) else f"{folder} cannot be written"
        if why_no_file(folder) != NOTHING:
            return f"{folder} is not a directory"
    return f"{path} cannot be made"


def resume_problem(name: str) -> str:
    """Why no run can go on from the checkpoint at a path, as far as a look tells; empty when one can."""
    if name in ("off", "auto"):
        return ""
    path = Path(name)
    if why := unseen(path):
        return f"{name}: {why}"
    if not is_directory(path):
        return f"{name} is no directory"
    if is_directory(path / CHECKPOINTS):
        return "" if Store(path / CHECKPOINTS).steps() else f"{name} is a run without a checkpoint"
    if why_no_file(path / MARKER):
        return f"{name} is no checkpoint, or one that was not completed: it has no file {MARKER!r}"
    try:
        read_state(path)
    except CheckpointError as error:
        return str(error)
    return ""
