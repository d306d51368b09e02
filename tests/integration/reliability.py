"""Writer of the table in docs/reliability.md, from the records of tests with the marker `fault`; see faults.py."""

from __future__ import annotations

import ast
import fcntl
from collections.abc import Mapping
from pathlib import Path

from faults import Outcome

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "reliability.md"
_BEGIN, _END = "<!-- faults: written by `make reliability` -->\n", "<!-- end of faults -->\n"
_HEAD = """\
| fault | what you see | seconds | lost | test |
| --- | --- | ---: | --- | --- |
"""


def declared_faults() -> dict[str, str]:
    """Return every declared fault of the tests -> "file::function", in the order of files and lines.

    Raises:
        ValueError: two tests declare one fault, or a name is not a literal.
    """
    found: dict[str, str] = {}
    for file in sorted((ROOT / "tests").rglob("test_*.py")):
        for node in ast.parse(file.read_text()).body:
            if not isinstance(node, ast.FunctionDef):
                continue
            test = f"{file.relative_to(ROOT)}::{node.name}"
            for decorator in node.decorator_list:
                for name in _names(decorator, test):
                    if name in found:
                        raise ValueError(f"{name!r} is declared by {found[name]} and by {test}")
                    found[name] = test
    return found


def _names(decorator: ast.expr, test: str) -> list[str]:
    """Return the faults named in a decorator, also in a parameter's marks."""
    names = []
    for node in ast.walk(decorator):
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "pytest.mark.fault":
            match node.args:
                case [ast.Constant(value=str(name))]:
                    names.append(name)
                case _:
                    raise ValueError(f"{test}: the name of a fault is written out, as in pytest.mark.fault('...')")
    return names


def rows_on(page: str) -> dict[str, str]:
    """Return fault -> its row on the page."""
    table = page.partition(_BEGIN)[2].partition(_END)[0]
    rows = table.removeprefix(_HEAD).splitlines()
    return {_read(row.removeprefix("| ").partition(" | ")[0]): row for row in rows}


def named_on(page: str) -> dict[str, str]:
    """Return fault -> the test named in its row."""
    return {name: row.removesuffix(" |").rpartition("`")[0].rpartition("`")[2] for name, row in rows_on(page).items()}


def render(page: str, outcomes: Mapping[str, Outcome], declared: Mapping[str, str]) -> str:
    """Return the page with the rows of the tested faults; the text around the table stays.

    Args:
        page: current page. The row of an untested fault stays, unless no test declares it any more. A declared
            fault without a row gets the row "not run for this page yet".
        outcomes: outcomes of the tested faults.
    """
    before, begin, rest = page.partition(_BEGIN)
    _, end, after = rest.partition(_END)
    assert begin and end, "the page has the two comments between which the table stands"
    rows = rows_on(page)
    for name, outcome in outcomes.items():
        cells = [name, outcome.sees, _seconds(outcome.seconds), outcome.lost, f"`{declared[name]}`"]
        rows[name] = f"| {' | '.join(_cell(cell) for cell in cells)} |"
    kept = [
        rows.get(name, f"| {_cell(name)} | not run for this page yet | | | `{declared[name]}` |") for name in declared
    ]
    return "".join([before, begin, _HEAD, *(f"{row}\n" for row in kept), end, after])


def write_page(outcomes: Mapping[str, Outcome]) -> None:
    """Write these rows to docs/reliability.md under a lock: other test processes may write it too."""
    with PAGE.open("r+") as page:
        fcntl.flock(page, fcntl.LOCK_EX)
        text = render(page.read(), outcomes, declared_faults())
        page.seek(0)
        page.truncate()
        page.write(text)


def _seconds(seconds: float) -> str:
    return f"{seconds:.0f}" if seconds >= 9.5 else f"{seconds:.1f}"


def _cell(text: str) -> str:
    return " ".join(text.replace("|", "\\|").split())


def _read(cell: str) -> str:
    return cell.replace("\\|", "|")
