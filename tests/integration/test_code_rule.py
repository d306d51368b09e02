"""The reward `code` on every format of tests in a row."""

from __future__ import annotations

import json
from typing import Any

import pytest

from roll_r3.rewards.code.code_rule import code, has_tests
from roll_r3.rewards.code.row_tests import same_output

pytestmark = pytest.mark.integration

ADD = "```python\ndef add(a, b):\n    return a + b\n```"
TWICE = "class Solution:\n    def twice(self, a, d):\n        return a * 2, d"
ECHO = "```python\nfrom __future__ import annotations\nif __name__ == '__main__':\n    print(int(input()) * 2)\n```"
CHECK = "def check(candidate):\n    x = 1\n    assert candidate(1, 2) == 3\n    assert candidate(x, 2) == {}\n"


def row(kind: str, *cases: Any, function: str = "", as_json: bool = True) -> dict[str, Any]:
    tests = json.dumps(cases) if as_json else list(cases)
    return {"case_type": kind, "test_cases": tests, "test_case_function": function}


def asserts(*texts: str) -> dict[str, Any]:
    return row("assert", *({"assert_code": text} for text in texts))


def io(stdin: str, stdout: str) -> dict[str, str]:
    return {"stdin": stdin, "expected_stdout": stdout}


PASS = {
    "assertions": (ADD, asserts("assert add(1, 2) == 3", "assert add('a', 'b') == 'ab'")),
    "a list, texts": (ADD, row("assert", "assert add(1, 2) == 3", as_json=False)),
    "imports that are offered": ("def f(x): return Counter(x), inf, math.pi", asserts("assert f('a')[0]['a'] == 1")),
    "test functions": (ADD, row("pytest", "from solution import add\n\ndef test_a():\n    assert add(1, 2) == 3")),
    "check": (ADD, row("check_based", {"assert_code": CHECK.format(3), "entry_point": "add"})),
    "check with imports": (
        "def root(x, y): return np.sqrt(x + y + 6)",
        row(
            "check_based",
            {"assert_code": CHECK.format(3), "entry_point": "root", "import_prefix": "import numpy as np\n"},
        ),
    ),
    "text": ("it's '''quoted''' \\", row("text", {"assert_code": "assert {response}.count(\"'''\") == 2"})),
    "output": (ECHO, row("input", io("4\n", "8"), io("5", "10\n"))),
    "an exit": ("import sys\nprint(1)\nsys.exit()", row("input", io("", "1"))),
    "calls": (TWICE, row("input", io('4\n{"1": 2}', '[8, {"1": 2}]'), function="twice")),
    "a wrapped value": (ADD, row("input", io("1\n2", "[3]"), function="add")),
    "no function named": (ECHO, row("input", io("4", "8"), function="None")),
    "after the thought": (f"<think>```python\ndef add(): 1\n```</think>{ADD}", asserts("assert add(1, 2) == 3")),
    "the block with a function": (f"```sh\nls\n```\n{ADD}\n```python\nadd(1)\n```", asserts("assert add(1, 2) == 3")),
}
FAIL = {
    "a wrong value": (ADD, asserts("assert add(1, 2) == 3", "assert add(1, 2) == 4")),
    "a wrong test function": (ADD, row("pytest", "def test_a(): assert add(1, 2) == 3\ndef test_b(): assert False")),
    "an early exit": ("```python\nimport os\nos._exit(0)\n```", asserts("assert False")),
    "a quiet exit": ("```python\nraise SystemExit\n```", asserts("assert False")),
    "no program": ("", asserts("assert True")),
    "an unfinished block": ("```python\ndef add(a, b): return a + b", asserts("assert add(1, 2) == 3")),
    "wrong output": (ECHO, row("input", io("4", "9"))),
    "an error": (ECHO, row("input", io("x", ""))),
    "no such function": (ADD, row("input", io("1\n2", "3"), function="sub")),
    "an endless loop": ("def add(a, b):\n    while True: pass", asserts("assert add(1, 2) == 3")),
    "code in a text": ("''' + str(open('/proc/self/nothing')) + '''", row("text", "assert {response} == ''")),
}


@pytest.mark.parametrize("name", PASS)
def test_a_program_that_passes_all_tests_scores_1(name: str) -> None:
    response, tests = PASS[name]
    assert code(response, tests) == 1.0


@pytest.mark.parametrize("name", FAIL)
def test_a_program_that_fails_a_test_scores_0(name: str) -> None:
    response, tests = FAIL[name]
    assert code(response, tests, seconds=1.0) == 0.0


def test_the_share_of_passed_tests() -> None:
    mixed = asserts("assert add(1, 2) == 3", "assert add(1, 2) == 4", "assert add(2, 2) == 4", "assert add(0, 0) == 0")
    assert code(ADD, mixed, reward_type="share") == 0.75
    checks = row("check_based", {"assert_code": CHECK.format(9), "entry_point": "add"})
    assert code(ADD, checks, reward_type="share") == 0.5


def test_tests_after_the_time_of_a_response_fail() -> None:
    slow = asserts(*["import time; time.sleep(0.5)"] * 4)
    assert 0 < code(ADD, slow, reward_type="share", total_seconds=0.7) < 1


def test_a_program_may_print_what_is_expected_of_it() -> None:
    long = row("input", io("", "x" * (2 << 20)))
    assert code("print('x' * (2 << 20))", long) == 1.0
    assert code("print('x' * (9 << 20))", long) == 0.0


@pytest.mark.parametrize(
    ("ours", "theirs", "same"),
    [
        ("1\n2\n", "1\n2", True),
        (" 1 \n\n2", "1\n2", True),
        ("0.333333", "0.3333333", True),
        ("1\n0.5", "1.000001\n0.5", True),
        ("100000", "100001", False),
        ("0.3333", "0.3334", False),
        ("1 2", "2 1", False),
        ("1", "1\n1", False),
        ("a", "b", False),
        ("", "", True),
    ],
)
def test_output_is_compared_by_lines_and_numbers(ours: str, theirs: str, same: bool) -> None:
    assert same_output(ours, theirs) == same


@pytest.mark.parametrize(
    ("bad", "why"),
    [
        ({}, "column test_cases must be a list with at least one test"),
        ({"test_cases": "[]"}, "column test_cases must be a list with at least one test"),
        ({"test_cases": "[1"}, "column test_cases must be a list, or one as JSON"),
        (row("assert", 3), "an entry of test_cases must be a mapping or a text, got a int"),
        (row("assert", {"stdin": ""}), "needs the text assert_code"),
        (row("input", {"stdin": ""}), "needs the text expected_stdout"),
        (row("input", io("", "x"), function="f"), "expected_stdout of a call must be JSON"),
        (row("check_based", "def c(: 1"), "assert_code is no Python"),
        (row("check_based", "x = 1"), "must define the function check"),
    ],
)
def test_a_row_without_readable_tests_is_refused(bad: dict[str, Any], why: str) -> None:
    for found in (lambda: has_tests(bad), lambda: code(ADD, bad)):
        with pytest.raises(ValueError, match=why.replace("(", r"\(")):
            found()


def test_rows_with_tests_are_accepted() -> None:
    assert {has_tests(tests) for _, tests in [*PASS.values(), *FAIL.values()]} == {1.0}
