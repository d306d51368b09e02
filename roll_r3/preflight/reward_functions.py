"""Reward functions: whether a run can find and call them. Their source is read and never executed.

Reward processes import them before a run starts (`roll_r3.rewards`), and report what only an import can find.
"""

from __future__ import annotations

import ast
import os
from collections.abc import Iterator, Mapping
from importlib.machinery import ModuleSpec, PathFinder
from importlib.metadata import distributions
from importlib.util import find_spec
from inspect import Parameter, Signature
from pathlib import Path

from roll_r3.config.rewards import RewardConfig
from roll_r3.config.rules.rewards import FUNCTION
from roll_r3.config.secrets import names_variable
from roll_r3.rewards.functions import CallError, call_of
from roll_r3.rewards.rules import BUILT_IN

_FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
_SCOPES = (*_FUNCTIONS, ast.Lambda, ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)


def missing_keys(rewards: Mapping[str, RewardConfig], variables: Mapping[str, str]) -> Iterator[str]:
    """Yield the variables of judges' keys set neither in this environment nor in `variables`.

    A key in place of a name is reported by a rule of its own, and never shown.
    """
    names = [reward.judge.api_key_env for reward in rewards.values() if reward.judge is not None]
    for name in dict.fromkeys(names):
        if name is not None and names_variable(name) and not (variables.get(name) or os.environ.get(name)):
            yield name


def reward_problems(rewards: Mapping[str, RewardConfig]) -> Iterator[str]:
    """Yield one problem per reward rule that is missing or cannot be called with its kwargs."""
    for config in rewards.values():
        problem = ""
        if config.reward in BUILT_IN:
            problem = _missing_package(config) or _function_problem(BUILT_IN[config.reward], config.kwargs)
        elif FUNCTION.fullmatch(config.reward):  # other text is reported by a rule of its own
            problem = _function_problem(config.reward, config.kwargs)
        if problem:
            yield f"{config.reward}: {problem}"


def _missing_package(config: RewardConfig) -> str:
    if config.reward == "math" and not list(distributions(name="math-verify")):
        return "it needs the package math-verify, which is not installed"
    return ""


def _function_problem(reward: str, kwargs: Mapping[str, object]) -> str:
    """Return why `module:function` cannot be called; empty if it can, or if only an import can tell."""
    module, _, name = reward.partition(":")
    spec = _find_module(module)
    if spec is None:
        return f"there is no module {module} on the import path"
    if spec.origin is None or not spec.origin.endswith(".py"):
        return ""  # compiled, or a namespace package
    try:
        tree = ast.parse(Path(spec.origin).read_bytes())
    except (OSError, SyntaxError, ValueError, RecursionError) as error:
        return f"{spec.origin} cannot be read: {error}"
    bound = [(_bound_name(node), node) for node in _module_scope(tree)]
    match [node for bound_name, node in bound if bound_name == name]:
        case []:
            unknown = {"*", "__getattr__"} & {bound_name for bound_name, _ in bound}
            return "" if unknown else f"{spec.origin} defines no {name}"
        case [ast.FunctionDef(decorator_list=[], args=arguments)]:
            return _call_problem(arguments, kwargs)
    return ""


def _find_module(name: str) -> ModuleSpec | None:
    """Find a module without importing its packages, as `find_spec` does for a dotted name."""
    first, *rest = name.split(".")
    try:
        spec = find_spec(first)
    except ValueError:  # a module without a spec, such as __main__
        return None
    for part in rest:
        spec = spec and PathFinder.find_spec(part, list(spec.submodule_search_locations or ()))
    return spec


def _module_scope(tree: ast.Module) -> Iterator[ast.AST]:
    """Yield the nodes of a module, except those inside functions, classes and comprehensions, in no set order."""
    open_nodes: list[ast.AST] = [tree]
    while open_nodes:  # a sum of 1,000 terms is nested too deep for recursion
        for child in ast.iter_child_nodes(open_nodes.pop()):
            yield child
            if not isinstance(child, _SCOPES):
                open_nodes.append(child)


def _bound_name(node: ast.AST) -> str | None:
    """Return the name bound by a node itself; `*` for all names of another module."""
    if isinstance(node, _FUNCTIONS):
        return node.name
    if isinstance(node, ast.alias):
        return node.asname or node.name.partition(".")[0]
    return node.id if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store) else None


def _call_problem(arguments: ast.arguments, kwargs: Mapping[str, object]) -> str:
    """Return why a function with these arguments cannot be called as a reward rule."""
    try:
        call_of(_signature(arguments), kwargs)
    except CallError as error:
        return str(error)
    return ""


def _signature(arguments: ast.arguments) -> Signature:
    """Return the signature of a `def`. A default is None, whatever its value."""
    by_position = [*arguments.posonlyargs, *arguments.args]
    required = len(by_position) - len(arguments.defaults)
    found = []
    for number, arg in enumerate(by_position):
        first = number < len(arguments.posonlyargs)
        kind = Parameter.POSITIONAL_ONLY if first else Parameter.POSITIONAL_OR_KEYWORD
        found.append(Parameter(arg.arg, kind, default=Parameter.empty if number < required else None))
    if arguments.vararg:
        found.append(Parameter(arguments.vararg.arg, Parameter.VAR_POSITIONAL))
    for arg, default in zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True):
        found.append(Parameter(arg.arg, Parameter.KEYWORD_ONLY, default=Parameter.empty if default is None else None))
    if arguments.kwarg:
        found.append(Parameter(arguments.kwarg.arg, Parameter.VAR_KEYWORD))
    return Signature(found)
