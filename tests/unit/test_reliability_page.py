"""docs/reliability.md has a row for every fault that a test declares, and no other."""

from __future__ import annotations

import pytest
import reliability
from faults import Fault, Outcome
from reliability import PAGE, declared_faults, named_on, render, rows_on

SEEN = Outcome("a | b died", 12.4, "nothing")


def test_the_page_has_what_the_tests_declare():
    assert named_on(PAGE.read_text()) == declared_faults(), "run make reliability"


def test_a_row_is_replaced_kept_and_dropped():
    declared = {"one": "tests/a.py::test_one", "two": "tests/a.py::test_two"}
    around = f"before\n| no | row |\n{reliability._BEGIN}{reliability._END}after\n"
    page = render(around, dict.fromkeys(declared, SEEN), declared)
    assert page.startswith("before\n") and page.endswith("after\n"), "what people wrote stays"
    assert named_on(page) == declared
    again = render(page, {"two": Outcome("said", 0.26, "a step")}, declared)
    assert rows_on(again) == {
        "one": r"| one | a \| b died | 12 | nothing | `tests/a.py::test_one` |",
        "two": "| two | said | 0.3 | a step | `tests/a.py::test_two` |",
    }
    assert list(rows_on(render(again, {}, {"two": declared["two"]}))) == ["two"], "nobody declares it any more"


def test_a_fault_is_declared_by_one_test(tmp_path, monkeypatch):
    monkeypatch.setattr(reliability, "ROOT", tmp_path)
    (tmp_path / "tests").mkdir()
    file = tmp_path / "tests" / "test_it.py"
    param = "@pytest.mark.parametrize('x', [pytest.param(1, marks=pytest.mark.fault('two'))])\n"
    file.write_text(f"@pytest.mark.fault('one')\n{param}def test_it(fault): ...\n")
    assert declared_faults() == dict.fromkeys(["one", "two"], "tests/test_it.py::test_it")
    file.write_text("@pytest.mark.fault('one')\ndef test_a(): ...\n@pytest.mark.fault('one')\ndef test_b(): ...\n")
    with pytest.raises(ValueError, match=r"'one' is declared by tests/test_it\.py::test_a and by"):
        declared_faults()
    file.write_text("@pytest.mark.fault(NAME)\ndef test_a(): ...\n")
    with pytest.raises(ValueError, match="is written out"):
        declared_faults()


def test_a_fault_says_all_three():
    fault = Fault("one")
    for say, missing in (
        (lambda: None, "user_sees"),
        (lambda: fault.user_sees("it"), "recovered"),
        (lambda: fault.recovered(1.0), "lost"),
    ):
        say()
        with pytest.raises(AssertionError, match=missing):
            _ = fault.outcome
    fault.lost("nothing")
    assert fault.outcome == Outcome("it", 1.0, "nothing")
