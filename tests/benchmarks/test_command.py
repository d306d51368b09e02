"""Command of the benchmarks, with benchmarks that take no time."""

from __future__ import annotations

import json
from importlib import import_module
from pathlib import Path

import pytest

from examples.benchmarks import __main__ as command
from examples.benchmarks import page
from examples.benchmarks.measuring import in_turn, ratio


@pytest.fixture
def output(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(command, "BENCHMARKS", ("a", "b"))
    monkeypatch.setattr(command, "run", lambda name, rounds: {"rounds": rounds})
    monkeypatch.setattr(page, "OUTPUT", tmp_path / "page.md")
    monkeypatch.setattr(page, "render", lambda report: " ".join(report))
    return tmp_path / "output" / "benchmarks.json"


def test_all_of_them_run_and_the_page_is_written_when_asked(output: Path) -> None:
    assert command.main(["--output", str(output), "--rounds", "3"]) == 0
    assert json.loads(output.read_text()) == {"a": {"rounds": 3}, "b": {"rounds": 3}}
    assert not page.OUTPUT.exists()
    assert command.main(["--output", str(output), "--write"]) == 0
    assert page.OUTPUT.read_text() == "a b"


def test_one_that_is_named_replaces_its_own_part(output: Path) -> None:
    command.main(["--output", str(output), "--rounds", "3"])
    command.main(["b", "--output", str(output), "--rounds", "4"])
    assert {name: part["rounds"] for name, part in json.loads(output.read_text()).items()} == {"a": 3, "b": 4}


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["c"], "no benchmark is called c"),
        (["--rounds", "0"], "--rounds is 0"),
        (["a", "--write"], "has no b: run them too"),
    ],
)
def test_what_cannot_be_done_is_said(
    output: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], said: str
) -> None:
    with pytest.raises(SystemExit):
        command.main([*arguments, "--output", str(output)])
    assert said in capsys.readouterr().err


@pytest.mark.parametrize("name", command.BENCHMARKS)
def test_each_that_has_a_name_can_be_run(name: str) -> None:
    assert callable(import_module(f"examples.benchmarks.{name}").measure)


def test_a_ratio_is_taken_round_by_round() -> None:
    """Slow the machine down tenfold half-way: the ratio stays."""
    assert ratio([2.0, 2.2, 20.0, 22.0], [1.0, 1.1, 10.0, 11.0]) == {
        "median": 2.0,
        "quartiles": [2.0, 2.0],
        "rounds": 4,
    }


def test_the_clocks_run_in_turn_after_one_round_of_warming_up() -> None:
    order = []

    def clock(name: str, seconds: float) -> float:
        order.append(name)
        return seconds

    seconds = in_turn({"a": lambda: clock("a", 1.0), "b": lambda: clock("b", 0.004)}, rounds=2)
    assert seconds == {"a": [1.0, 1.0], "b": [0.004, 0.004]}
    assert "".join(order) == "bba" + "abb" + "bba", "short calls repeat until their round is long enough"
