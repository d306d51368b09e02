"""Write docs/from_roll.md from the key table: python -m roll_r3.config.roll_yaml [--check]."""

from __future__ import annotations

import sys
from pathlib import Path

from roll_r3.config import generated
from roll_r3.config.roll_yaml.page import render_from_roll

OUTPUT = Path("docs/from_roll.md")

if __name__ == "__main__":
    sys.exit(generated.main(OUTPUT, render_from_roll))
