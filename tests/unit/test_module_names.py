"""Names of modules: one name means one thing, but for the conventions below."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path

import roll_r3

ROOT = Path(roll_r3.__file__).parent
FAMILIES = ("engines/sglang", "engines/vllm", "engines/hf", "trainers/megatron", "trainers/fsdp2")
"""Packages of one kind each: the same part has the same name in all of them, and that of its contract elsewhere."""
SUBJECTS = ("config/rules", "preflight/rules", "from_roll/tables")
"""Folders of tables: a module is named after the section or module it is about."""
CONTRACT = "base.py"
"""Contract of a room."""


def test_no_two_modules_share_a_name_without_a_convention():
    places: dict[str, list[str]] = defaultdict(list)
    for path in ROOT.rglob("*.py"):
        place = path.relative_to(ROOT).as_posix()
        if path.name.startswith("__") or path.name == CONTRACT or place.startswith((*FAMILIES, *SUBJECTS, "platform/")):
            continue
        places[path.name].append(place)
    assert not {name: found for name, found in places.items() if len(found) > 1}
