"""Tests of a row as programs, and verdicts on their output. The formats are ROLL's for code data.

The columns `case_type`, `test_cases` and `test_case_function` are read:

- assert, pytest: `assert_code` follows the solution; its functions `test_...` are called.
- check_based: `assert_code` defines `check`, called with `entry_point`; `import_prefix` precedes the solution.
- text: `assert_code` reads `{response}`, the response as a string. No program of the response runs.
- else: `stdin` and `expected_stdout`; with `test_case_function`, lines of `stdin` are its arguments in JSON.
"""

from __future__ import annotations

import ast
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

_STARRED = [
    "string",
    "re",
    "datetime",
    "collections",
    "heapq",
    "bisect",
    "copy",
    "math",
    "random",
    "statistics",
    "itertools",
    "functools",
    "operator",
    "io",
    "sys",
    "json",
    "builtins",
    "typing",
]
_PRELUDE = "\n".join(
    [f"from {name} import *" for name in _STARRED]
    + ["import string, re, datetime, collections, heapq, bisect, copy, math, random, statistics, itertools, functools"]
    + ["import operator, io, sys, json", "from typing import List, Dict, Any, Optional, Tuple", "from math import inf"]
    + ["sys.setrecursionlimit(6 * 10**5)"]
)
"""Imports offered to every solution, as in ROLL."""
_FRAME = """\
import os, sys, types
module = types.ModuleType({name!r})
sys.modules[{name!r}] = module
for text in {texts!r}:
    exec(compile(text, {name!r}, "exec", dont_inherit=True), module.__dict__)
"""
_CALL_TESTS = """\
for name in [n for n in list(module.__dict__) if n.startswith("test_") and callable(module.__dict__[n])]:
    module.__dict__[name]()
"""
_PASSED = "os.write(1, {token!r}.encode())\n"
_CALL = """\
import json
function = module.__dict__.get({function!r}) or getattr(module.__dict__["Solution"](), {function!r})
arguments = [json.loads(line) for line in sys.stdin.read().split("\\n")]
whole = lambda d: isinstance(d, dict) and d and all(k.lstrip("-").isdigit() for k in d)
arguments = [{{int(k): v for k, v in a.items()}} if whole(a) else a for a in arguments]
value = json.dumps(function(*arguments))
os.write(1, ({token!r} + value).encode())
"""
_RELATIVE, _ABSOLUTE = 1e-5, 1e-8
"""Tolerances of numbers on lines of their own."""


@dataclass(frozen=True)
class Test:
    """One test: program, standard input, and judgement of the output."""

    program: str
    stdin: str
    passes: Callable[[str], bool]
    expected_bytes: int = 0
    """Length of the expected output."""


def tests_of(row: Mapping[str, Any], code: str, response: str, token: str) -> list[Test]:
    """Return the tests of a row.

    Args:
        code: program of the response.
        token: mark of a test's end; unknown to the response.

    Raises:
        ValueError: the row's columns cannot be read, or hold no test.
    """
    cases, kind = _cases(row), str(row.get("case_type") or "")
    make = {"assert": _asserted, "pytest": _asserted, "check_based": _checked, "text": _of_text}.get(kind)
    if make is not None:
        return [test for case in cases for test in make(_as_mapping(case), code, response, token)]
    function = str(row.get("test_case_function") or "")
    make_io = _printed if function in ("", "None") else _called
    return [make_io(_as_mapping(case), code, function, token) for case in cases]


def _cases(row: Mapping[str, Any]) -> Sequence[Any]:
    cases = row.get("test_cases")
    if isinstance(cases, str):
        try:
            cases = json.loads(cases)
        except ValueError as error:
            raise ValueError(f"column test_cases must be a list, or one as JSON: {error}") from error
    if not isinstance(cases, Sequence) or isinstance(cases, str) or not cases:
        raise ValueError("column test_cases must be a list with at least one test, or one as JSON")
    return cases


def _as_mapping(case: Any) -> Mapping[str, Any]:
    if isinstance(case, str):
        return {"assert_code": case}
    if not isinstance(case, Mapping):
        raise ValueError(f"an entry of test_cases must be a mapping or a text, got a {type(case).__name__}")
    return case


def _text(case: Mapping[str, Any], key: str) -> str:
    value = case.get(key)
    if isinstance(value, list):
        value = "\n".join(map(str, value))
    if not isinstance(value, str):
        raise ValueError(f"an entry of test_cases needs the text {key}, got {type(value).__name__}")
    return value


def _framed(*texts: str, name: str = "solution") -> str:
    return _FRAME.format(name=name, texts=[_PRELUDE, *texts])


def _until_end(program: str, token: str) -> Test:
    """Return a test passed by reaching the program's end."""
    return Test(program + _PASSED.format(token=token), "", lambda output: output.endswith(token))


def _asserted(case: Mapping[str, Any], code: str, response: str, token: str) -> list[Test]:
    return [_until_end(_framed(code, _text(case, "assert_code")) + _CALL_TESTS, token)]


def _checked(case: Mapping[str, Any], code: str, response: str, token: str) -> list[Test]:
    """Return one test for each assertion in `check`."""
    solution = str(case.get("import_prefix") or "") + "\n" + code
    call = f"\ncheck({case.get('entry_point') or 'candidate'})"
    return [_until_end(_framed(solution, text + call), token) for text in _single_checks(_text(case, "assert_code"))]


def _single_checks(text: str) -> list[str]:
    """Return the text once for each assertion of its function `check`, without the other assertions."""
    try:
        tree = ast.parse(text)
    except SyntaxError as error:
        raise ValueError(f"assert_code is no Python: {error}") from error
    check = next((n for n in tree.body if isinstance(n, ast.FunctionDef) and n.name == "check"), None)
    if check is None:
        raise ValueError("assert_code of a check_based test must define the function check")
    body = check.body
    found = []
    for chosen in [node for node in body if isinstance(node, ast.Assert)]:
        check.body = [node for node in body if node is chosen or not isinstance(node, ast.Assert)]
        found.append(ast.unparse(tree))
    return found or [text]


def _of_text(case: Mapping[str, Any], code: str, response: str, token: str) -> list[Test]:
    return [_until_end(_framed(_text(case, "assert_code").replace("{response}", repr(response))), token)]


def _printed(case: Mapping[str, Any], code: str, function: str, token: str) -> Test:
    expected = _text(case, "expected_stdout")
    program = _framed(code, name="__main__")
    return Test(program, _text(case, "stdin"), lambda output: same_output(output, expected), len(expected.encode()))


def _called(case: Mapping[str, Any], code: str, function: str, token: str) -> Test:
    text = _text(case, "expected_stdout")
    try:
        expected = json.loads(text)
    except ValueError as error:
        raise ValueError(f"expected_stdout of a call must be JSON: {error}") from error
    program = _framed(code) + _CALL.format(function=function, token=token)

    def passes(output: str) -> bool:
        _, found, value = output.rpartition(token)
        return bool(found) and json.loads(value) in (expected, *(expected if _is_single(expected) else ()))

    return Test(program, _text(case, "stdin"), passes, len(text.encode()))


def _is_single(value: Any) -> bool:
    """Return True for a list of one: some data wraps the expected value."""
    return isinstance(value, list) and len(value) == 1


def same_output(output: str, expected: str) -> bool:
    """Return True if the lines are equal without white space around them and without empty lines.

    Where every line is a number and not all are whole, they may differ by 1e-5, relatively.
    """
    ours, theirs = ([line.strip() for line in text.strip().split("\n") if line.strip()] for text in (output, expected))
    if ours == theirs:
        return True
    if len(ours) != len(theirs) or all(line.isdigit() for line in (*ours, *theirs)):
        return False
    try:
        pairs = [(float(a), float(b)) for a, b in zip(ours, theirs, strict=True)]
    except ValueError:
        return False
    return all(math.isclose(a, b, rel_tol=_RELATIVE, abs_tol=_ABSOLUTE) for a, b in pairs)
