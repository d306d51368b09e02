"""Data files, reward functions and the output directory: whether they are there. Code is read, never run."""

from __future__ import annotations

import ast
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from importlib.machinery import ModuleSpec, PathFinder
from importlib.metadata import distributions
from inspect import Parameter, Signature
from pathlib import Path

from roll_r3.config.disk import NOTHING, is_directory, unseen, why_no_file
from roll_r3.config.pipeline import RewardConfig
from roll_r3.config.rules.data import BUILT_IN_REWARDS, FUNCTION
from roll_r3.config.workers import DataArgs
from roll_r3.data.faults import Faults
from roll_r3.data.rows import validate_rows
from roll_r3.errors import CheckpointError
from roll_r3.rewards.calls import CallError, call_of
from roll_r3.saving.manifest import MARKER
from roll_r3.saving.state import read_state
from roll_r3.saving.store import CHECKPOINTS, Store


def data_problems(args: DataArgs) -> Iterator[str]:
    """Problems of the sources of prompts, as far as reading for seconds tells."""
    faults = Faults()
    validate_rows(args, faults)
    yield from faults.lines()


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
        call_of(_signature(arguments), kwargs)
    except CallError as error:
        return str(error)
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
