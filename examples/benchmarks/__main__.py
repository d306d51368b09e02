"""Command that runs benchmarks and collects their figures in one JSON file.

    .venv/bin/python -m examples.benchmarks [name ...] [--rounds 15] [--output output/benchmarks.json] [--write]

Without a name all of them run (half an hour on two cores). Named ones replace their own part of the file. `--write`
makes docs/performance.md from the file.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path

from examples.benchmarks import page
from examples.benchmarks.measuring import Report, machine

BENCHMARKS = (
    "route_wire",
    "wire_alternatives",
    "route_delivery",
    "route_preparation",
    "replay_step_time",
    "rollout_routes",
)
"""Modules in this folder; `measure(rounds)` of each makes its part of the report."""

logger = logging.getLogger("benchmarks")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m examples.benchmarks", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="name", help=f"of {', '.join(BENCHMARKS)}; all when none is given")
    parser.add_argument("--rounds", type=int, default=15, help="of everything in turn; a figure is their median")
    parser.add_argument("--output", type=Path, default=Path("output/benchmarks.json"))
    parser.add_argument("--write", action="store_true", help=f"write {page.OUTPUT} from the output")
    options = parser.parse_args(arguments)
    if unknown := [name for name in options.names if name not in BENCHMARKS]:
        parser.error(f"no benchmark is called {', '.join(unknown)}; there are {', '.join(BENCHMARKS)}")
    if options.rounds < 1:
        parser.error(f"--rounds is {options.rounds}, but a median takes at least 1")
    report: Report = json.loads(options.output.read_text()) if options.output.is_file() else {}
    for name in options.names or BENCHMARKS:
        logger.info("running %s", name)
        report[name] = run(name, options.rounds)
        options.output.parent.mkdir(parents=True, exist_ok=True)
        options.output.write_text(json.dumps(report, indent=2) + "\n")
    logger.info("wrote %s", options.output)
    if options.write:
        if missing := [name for name in BENCHMARKS if name not in report]:
            parser.error(
                f"--write takes all benchmarks, but {options.output} has no {', '.join(missing)}: run them too"
            )
        page.OUTPUT.write_text(page.render(report))
        logger.info("wrote %s", page.OUTPUT)
    return 0


def run(name: str, rounds: int) -> Report:
    """Run one benchmark. The import is local, so that child processes of others do not load its engines."""
    part: Report = import_module(f"examples.benchmarks.{name}").measure(rounds)
    return {"machine": machine(), **part}


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    sys.exit(main())
