"""Picture of the packages in docs/architecture.md, drawn from the imports of roll_r3.

python -m docs.packages [--check]
"""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import grimp

from roll_r3.config import generated

PACKAGE = "roll_r3"
OUTPUT = Path("docs/architecture.md")
BEGIN, END = "<!-- packages: drawn by `make docs` -->\n", "<!-- end of packages -->\n"
TOLERANCE = 0.1
"""Share by which a package may grow or shrink before its number of lines on the page is changed."""

_LABEL = re.compile(r'^ +(\w+)\["\w+<br/>([\d,]+) lines"\]$', re.MULTILINE)


@dataclass(frozen=True)
class House:
    """Top-level packages and modules of a package, with their direct imports of each other."""

    imports: Mapping[str, frozenset[str]]
    """Name -> imported names."""
    lines: Mapping[str, int]
    """Name -> number of lines of its Python files."""


def read_house(package: str, folder: Path) -> House:
    """Read the imports and the size of every top-level package.

    Args:
        package: an importable name.
        folder: its directory.
    """
    graph = grimp.build_graph(package, cache_dir=None)
    rooms = sorted(graph.find_children(package))
    for room in rooms:
        graph.squash_module(room)
    names = {room: room.rpartition(".")[2] for room in rooms}
    imports = {
        names[room]: frozenset(
            names[found] for found in graph.find_modules_directly_imported_by(room) if found in names
        )
        for room in rooms
    }
    return House(imports, {name: _lines(folder / name) for name in imports})


def reduced(imports: Mapping[str, frozenset[str]]) -> dict[str, frozenset[str]]:
    """Remove every import also reached through another one.

    Raises:
        ValueError: some packages import each other in a circle.
    """
    below = {name: _reached(name, imports) for name in imports}
    circle = sorted(name for name, reached in below.items() if name in reached)
    if circle:
        raise ValueError(f"these packages import each other in a circle: {', '.join(circle)}")
    return {
        name: frozenset(found for found in direct if not any(found in below[other] for other in direct))
        for name, direct in imports.items()
    }


def draw(house: House, shown_lines: Mapping[str, int]) -> str:
    """Draw a Mermaid flowchart, from the top of the imports to the bottom.

    Args:
        shown_lines: name -> number of lines on the present page. It is kept while within `TOLERANCE`, so
            commits rarely change the page.
    """
    arrows = reduced(house.imports)
    order = sorted(arrows, key=lambda name: (-_depth(name, arrows), name))
    labels = [f'    {name}["{name}<br/>{_kept(house.lines[name], shown_lines.get(name)):,} lines"]' for name in order]
    links = [f"    {name} --> {found}" for name in order for found in sorted(arrows[name])]
    return "\n".join(["```mermaid", "flowchart TD", *labels, *links, "```", ""])


def render_page(page: str, house: House) -> str:
    """Return the page with the picture of this house between its two comments.

    Raises:
        ValueError: the page lacks the comments.
    """
    before, begin, rest = page.partition(BEGIN)
    old, end, after = rest.partition(END)
    if not (begin and end):
        raise ValueError(f"{OUTPUT} must have the lines {BEGIN.strip()!r} and {END.strip()!r}")
    shown = {name: int(lines.replace(",", "")) for name, lines in _LABEL.findall(old)}
    return "".join([before, begin, draw(house, shown), end, after])


def _lines(path: Path) -> int:
    files = path.rglob("*.py") if path.is_dir() else [path.with_suffix(".py")]
    return sum(len(file.read_text().splitlines()) for file in files)


def _reached(start: str, imports: Mapping[str, frozenset[str]]) -> set[str]:
    """Names reached from one by at least one import."""
    reached: set[str] = set()
    waiting = [*imports[start]]
    while waiting:
        name = waiting.pop()
        if name not in reached:
            reached.add(name)
            waiting += imports[name]
    return reached


def _depth(name: str, imports: Mapping[str, frozenset[str]]) -> int:
    """Length of the longest way down from a package."""
    return 1 + max((_depth(found, imports) for found in imports[name]), default=0)


def _kept(lines: int, shown: int | None) -> int:
    """Number of lines to show: the present figure while it is close, else the new one in two digits."""
    if shown and abs(lines - shown) <= TOLERANCE * shown:
        return shown
    return round(lines, 2 - len(str(lines)))


if __name__ == "__main__":
    sys.exit(generated.main(OUTPUT, lambda: render_page(OUTPUT.read_text(), read_house(PACKAGE, Path(PACKAGE)))))
