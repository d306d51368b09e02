"""Data stays data: no module takes in pickles, evaluates text, or starts a shell. SECURITY.md promises it."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
MODULES = sorted(path for folder in ("roll_r3", "examples") for path in (ROOT / folder).rglob("*.py"))
NEVER_IMPORTED = {"pickle", "_pickle", "marshal", "shelve", "dill", "cloudpickle", "joblib", "code", "codeop"}
NEVER_CALLED = {
    "eval", "exec", "compile", "__import__", "os.system", "os.popen", "subprocess.getoutput",
    "subprocess.getstatusoutput", "torch.load", "torch.jit.load", "yaml.load",
    "yaml.load_all", "yaml.full_load", "yaml.unsafe_load", "tarfile.open", "zipfile.ZipFile", "shutil.unpack_archive",
}  # fmt: skip
NEVER_TRUE = {"allow_pickle", "shell", "trust_remote_code"}
NAMES_CODE = {
    "roll_r3/rewards/rules.py": "a reward rule that the configuration names",
    "roll_r3/strategies/registry.py": "a strategy of the registry",
    "roll_r3/engines/sglang/launcher.py": "SGLang, in its own interpreter",
    "roll_r3/engines/vllm/launcher.py": "vLLM, in its own interpreter",
    "roll_r3/engines/vllm/plugin/roll_r3_vllm/__init__.py": "a file of this package",
    "roll_r3/engines/vllm/plugin/roll_r3_vllm/weights.py": "a file of this package",
    "examples/benchmarks/__main__.py": "a benchmark by its name",
    "roll_r3/tracking/trackers/libraries.py": "a tracker of the table",
}
"""Modules importing or running another by a computed name, and the name."""
PICKLES_IN_THE_GROUP = {
    "roll_r3/replay/audit.py",
    "roll_r3/trainers/checkpoint.py",
    "roll_r3/batch/data_parallel.py",
    "roll_r3/trainers/megatron/weight_export.py",
    "roll_r3/trainers/megatron/backend.py",
    "roll_r3/trainers/all_ranks.py",
}
"""Modules sending objects between the ranks of a trainer (torch pickles them)."""


def dotted(node: ast.expr) -> str:
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else ""


def imported(node: ast.AST) -> dict[str, str]:
    """Name in the module -> what an import statement binds to it, in full."""
    if isinstance(node, ast.Import):
        heads = {name: name for alias in node.names if not alias.asname for name in [alias.name.partition(".")[0]]}
        return heads | {alias.asname: alias.name for alias in node.names if alias.asname}
    if isinstance(node, ast.ImportFrom) and not node.level:
        return {alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names}
    return {}


def faults(tree: ast.AST) -> Iterator[str]:
    bound = {name: full for node in ast.walk(tree) for name, full in imported(node).items()}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        else:  # what is imported by its name can be called by any other, or be handed on
            names = list(imported(node).values())
            yield from (f"imports {name}" for name in names if name in NEVER_CALLED)
        yield from (f"imports {name}" for name in names if name.partition(".")[0] in NEVER_IMPORTED)
        if isinstance(node, ast.Call):
            head, dot, rest = dotted(node.func).partition(".")
            called = (bound.get(head, head) + dot + rest).removeprefix("builtins.")
            if called in NEVER_CALLED:
                yield f"calls {called} in line {node.lineno}"
            for keyword in node.keywords:
                if keyword.arg in NEVER_TRUE and isinstance(keyword.value, ast.Constant) and keyword.value.value:
                    yield f"{keyword.arg} in line {node.lineno}"


def calls(tree: ast.AST) -> set[str]:
    """Last names of what is called."""
    return {dotted(node.func).rpartition(".")[2] for node in ast.walk(tree) if isinstance(node, ast.Call)}


def test_there_are_modules():
    assert len(MODULES) > 100


@pytest.mark.parametrize("path", MODULES, ids=[str(path.relative_to(ROOT)) for path in MODULES])
def test_a_module_takes_in_no_code(path):
    assert list(faults(ast.parse(path.read_text()))) == []


@pytest.mark.parametrize(
    "source",
    ["import pickle", "from pickle import loads", "eval('1')", "torch.load(x)", "np.load(x, allow_pickle=True)",
     "from os import system", "from os import system as s", "from torch import load", "from torch.jit import load as l",
     "import os as o\no.system(x)", "import torch as t\nt.load(x)", "from torch import jit\njit.load(x)",
     "import torch.jit as j\nj.load(x)", "import numpy, pickle.x as p", "builtins.eval(x)",
     "from subprocess import getoutput",
     "subprocess.run(x, shell=True)", "A.from_pretrained(x, trust_remote_code=True)", "yaml.load(x)"],
)  # fmt: skip
def test_what_takes_in_code_is_found(source):
    assert list(faults(ast.parse(source)))


@pytest.mark.parametrize(
    "source", ["from re import compile\ncompile(x)", "import json as torch\ntorch.load(x)", "x.eval()"]
)
def test_what_has_such_a_name_alone_is_not(source):
    assert not list(faults(ast.parse(source)))


def test_who_runs_code_by_name_and_who_pickles_between_ranks_is_known():
    by_name, pickling = set(), set()
    for path in MODULES:
        called, name = calls(ast.parse(path.read_text())), path.relative_to(ROOT).as_posix()
        if called & {"import_module", "run_path", "run_module"}:
            by_name.add(name)
        if any(each.endswith(("gather_object", "_object_list", "scatter_object")) for each in called):
            pickling.add(name)
    assert by_name == set(NAMES_CODE)
    assert pickling == PICKLES_IN_THE_GROUP
