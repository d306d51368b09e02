"""Durations do not come from the clock of the wall, which is set back and forth."""

from __future__ import annotations

import ast
from pathlib import Path

ROOT = Path(__file__).parents[2]
MODULES = sorted((ROOT / "roll_r3").rglob("*.py"))
WALL = {"time.time", "time.time_ns", "datetime.now", "datetime.utcnow", "datetime.today"}


def test_no_module_measures_time_by_the_wall_clock() -> None:
    asked = set()
    for path in MODULES:
        calls = (node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call))
        asked |= {(path.name, name) for call in calls if (name := ast.unparse(call.func)) in WALL}
    assert asked == {("launch.py", "datetime.now")}, "the name of a run alone, in UTC"
