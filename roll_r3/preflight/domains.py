"""Domains in the first rows of a file, to find a missing reward rule before the start."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from itertools import islice
from pathlib import Path

from roll_r3.config.findings.report import show_value
from roll_r3.config.reading.disk import why_no_file
from roll_r3.config.rewards import RewardConfig
from roll_r3.config.workers import DataArgs

_LOOKED_AT = 8 << 20
"""Bytes read from a file; a run reads all of it at its start."""
_SHOWN = 8


def domains_without_rule(args: DataArgs, rewards: Mapping[str, RewardConfig]) -> Iterator[str]:
    """Yield domains without a reward rule, from the first rows of each .jsonl file."""
    named = {tag for reward in rewards.values() for tag in reward.tag_included}
    if args.domain is None or not rewards or any(not reward.tag_included for reward in rewards.values()):
        return
    for name in (args.file_name,) if isinstance(args.file_name, str) else args.file_name:
        if lost := sorted(_domains(Path(name), args.domain) - named):
            yield f"{name} has rows of {', '.join(map(show_value, islice(lost, _SHOWN)))}"


def _domains(path: Path, column: str) -> set[str]:
    """Return the domains of the first rows; none for an unreadable file, reported by another rule."""
    if path.suffix != ".jsonl" or why_no_file(path):
        return set()
    try:
        lines = _start_of(path).splitlines()
        rows = [json.loads(line) for line in lines if line.strip()]
    except (OSError, ValueError, RecursionError):
        return set()
    return {str(row[column]) for row in rows if isinstance(row, dict) and column in row}


def _start_of(path: Path) -> bytes:
    with path.open("rb") as stream:
        start = stream.read(_LOOKED_AT)
    return start if len(start) < _LOOKED_AT else start.rpartition(b"\n")[0]
