"""Command line of the generators of documentation pages: write a page, or check it with --check."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path


def main(output: Path, render: Callable[[], str], arguments: Sequence[str] | None = None) -> int:
    """Write `output`, or with --check compare it; return the exit status.

    Args:
        output: path relative to the project's root.
    """
    parser = argparse.ArgumentParser(description=f"write {output}")
    parser.add_argument("--check", action="store_true", help="write nothing, fail if the file is out of date")
    parser.add_argument("--output", type=Path, default=output)
    options = parser.parse_args(arguments)
    text = render()
    if not options.check:
        options.output.write_text(text)
    elif not options.output.is_file() or options.output.read_text() != text:
        print(f"{options.output} is out of date: run make docs", file=sys.stderr)
        return 1
    return 0
