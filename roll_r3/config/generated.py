"""Files that are generated from the code and kept beside it: written by a command, compared by the checks."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path


def table_row(*cells: str) -> str:
    """A row of a table in Markdown, which would take a bar in a cell for its end."""
    return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"


def main(output: Path, render: Callable[[], str], arguments: Sequence[str] | None = None) -> int:
    """Write `output`, or with --check compare it; returns the exit status.

    Args:
        output: where the file is, relative to the project's root.
    """
    parser = argparse.ArgumentParser(description=f"write {output}")
    parser.add_argument("--check", action="store_true", help="fail if the file is not what would be written")
    parser.add_argument("--output", type=Path, default=output)
    options = parser.parse_args(arguments)
    text = render()
    if not options.check:
        options.output.write_text(text)
    elif not options.output.is_file() or options.output.read_text() != text:
        print(f"{options.output} is out of date: run make docs", file=sys.stderr)
        return 1
    return 0
