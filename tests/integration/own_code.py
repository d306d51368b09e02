"""Checkpoints with their own code, to detect its execution."""

from __future__ import annotations

import json
from pathlib import Path


def with_code_of_its_own(checkpoint: Path) -> Path:
    """Add code to a checkpoint; return the file written by this code when it is imported."""
    ran = checkpoint / "ran"
    (checkpoint / "own_code.py").write_text(f"open({str(ran)!r}, 'w').close()\nclass Config: ...\nclass Model: ...\n")
    fields = json.loads((checkpoint / "config.json").read_text())
    fields["auto_map"] = {"AutoConfig": "own_code.Config", "AutoModelForCausalLM": "own_code.Model"}
    (checkpoint / "config.json").write_text(json.dumps(fields))
    return ran
