"""Survey of a folder of ROLL's files: python -m tests.unit.from_roll.survey FOLDER

Checks every YAML file below FOLDER, as `--validate-only --elsewhere` does, and prints a line for each: errors, keys in
them, and whether sharing of GPUs is the only one. Figures by pipeline follow.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import statistics
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

from roll_r3 import run


def check(path: Path) -> list[dict[str, Any]]:
    """Return the findings on a file, checked from its own folder."""
    out, before = io.StringIO(), Path.cwd()
    os.chdir(path.parent)
    try:
        with contextlib.redirect_stdout(out):
            run.main(["--config", path.name, "--validate-only", "--elsewhere", "--format", "json"])
    finally:
        os.chdir(before)
    findings: list[dict[str, Any]] = json.loads(out.getvalue())["findings"]
    return findings


def main(folder: Path) -> None:
    """Print the survey of a folder."""
    groups: dict[str, list[int]] = defaultdict(list)
    for path in sorted(folder.rglob("*.yaml")):
        errors = [finding for finding in check(path) if finding["severity"] == "error"]
        rules = sorted({error["rule"] for error in errors})
        keys = sum(len(error["fields"]) for error in errors)
        state = "loads" if not errors else "devices alone" if rules == ["gpus-not-shared"] else ", ".join(rules)
        print(f"{path.relative_to(folder)}: {len(errors)} errors, {keys} keys: {state}")
        groups["other pipelines" if rules == ["roll-pipeline"] else "RLVR and includes"].append(len(errors))
    for name, numbers in groups.items():
        accepted, median = numbers.count(0), statistics.median(numbers)
        print(f"{name}: {len(numbers)} files, {accepted} load, errors {min(numbers)}/{median}/{max(numbers)}")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
