"""Command for docs/from_roll.md, generated from the key tables: python -m roll_r3.from_roll [--check]."""

from __future__ import annotations

import sys
from pathlib import Path

from roll_r3.config import generated
from roll_r3.from_roll.page import render_from_roll

OUTPUT = Path("docs/from_roll.md")

if __name__ == "__main__":
    sys.exit(generated.main(OUTPUT, render_from_roll))
