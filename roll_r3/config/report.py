"""What a check found wrong, and how it is shown to the person who wrote the YAML."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import Literal

from pydantic import BaseModel

from roll_r3.config.dialect import Dialect
from roll_r3.config.readable import printable
from roll_r3.config.tree import overlap
from roll_r3.errors import ConfigError

Severity = Literal["error", "warning", "note"]
SEVERITIES: tuple[Severity, ...] = ("error", "warning", "note")
"""The gravest first."""
MORE = "more-findings"
"""Id of the finding that stands for those that are not listed."""
_FILE_AND_LINE = re.compile(r"(?!override )(.*?):(\d+)(?:, from |$)")
_MAX_VALUE = 80
"""Characters of a value that are shown."""
MAX_FINDINGS = 200
"""Findings of one severity that are told one by one."""
_MAX_FIELDS = 20
"""Fields of a finding that are shown to people."""


class _Absent(Enum):
    ABSENT = "not given"


ABSENT = _Absent.ABSENT
"""The value of a field that the YAML does not have."""


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong with a configuration.

    Example:
        >>> finding = Finding("vpp-needs-pp", "error", (("a.vpp", 2), ("a.pp", 1)), why="...", fix="...")
        >>> finding.path
        'a.vpp'
    """

    rule: str
    """Id of the rule or of the kind of mistake; stable, so that it can be searched for."""
    severity: Severity
    found: tuple[tuple[str, object], ...]
    """(dotted path, value) of each field involved, the one to change first; empty for the file as a whole."""
    why: str
    """What cannot work, as one sentence."""
    fix: str = ""
    """What to write instead."""
    depends: tuple[str, ...] = ()
    """Dotted paths of further fields that had a part in it, `*` any key; not shown."""
    count: int = 1
    """Findings that it stands for, see `limited`."""
    shows: Literal["fields", "on-request", "line"] = "fields"
    """Fields that people see: the first of them, all of them where they ask for it (see `render`), or none, since the
    reason names them."""

    @property
    def path(self) -> str:
        """The field to change; empty for the file as a whole."""
        return self.found[0][0] if self.found else ""

    def concerns(self, path: str) -> bool:
        """Whether the value at `path`, or one inside or around it, had a part in this."""
        return any(overlap(mine, path) for mine in (*(p for p, _ in self.found), *self.depends))


@dataclass(frozen=True)
class Origins:
    """Where each value of a configuration came from."""

    file: str
    places: Mapping[str, str] = field(default_factory=dict)
    """Dotted path -> `file:line`, or the override as it was typed. Fields that nobody gave are not in it."""
    dialect: Dialect | None = None
    """Dialect of the file; None: it could not be read."""

    @property
    def said_first(self) -> str:
        """The first line of a report; empty where nothing is known of the file."""
        return self.dialect.line(printable(self.file)) if self.dialect else ""

    def of(self, path: str) -> str:
        """The place of the value at `path`; "default" when nobody gave it."""
        return self.places.get(path, "default")

    def near(self, path: str) -> str:
        """The place of `path`, or of the innermost section around it that was given."""
        while path and path not in self.places:
            path = path.rpartition(".")[0]
        return self.places.get(path, self.file)

    def file_and_line(self, path: str) -> tuple[str, int | None]:
        """The file to open for `path`, and the line where it, or the section around it, stands; None: not in it."""
        match = _FILE_AND_LINE.match(self.near(path))
        return (match[1], int(match[2])) if match else (self.file, None)


class InvalidConfigError(ConfigError):
    """A configuration with mistakes, all of them: `findings` for programs, the text for people."""

    def __init__(self, findings: Iterable[Finding], origins: Origins) -> None:
        self.findings = tuple(findings)
        self.origins = origins
        super().__init__(render(self.findings, origins))


def has_errors(findings: Iterable[Finding]) -> bool:
    """Whether one of them stops a run."""
    return any(finding.severity == "error" for finding in findings)


def limited(findings: Iterable[Finding]) -> tuple[Finding, ...]:
    """The first `MAX_FINDINGS` of each severity, in their order; one more finding says how many others there are."""
    kept: list[Finding] = []
    told = dict.fromkeys(SEVERITIES, 0)
    left = dict.fromkeys(SEVERITIES, 0)
    for finding in findings:
        if finding.rule != MORE and told[finding.severity] < MAX_FINDINGS:
            told[finding.severity] += 1
            kept.append(finding)
        else:
            left[finding.severity] += finding.count
    for severity, count in left.items():
        if count:
            what = f"{severity} is" if count == 1 else f"{severity}s are"
            fix = f"mend the first {MAX_FINDINGS}, and look again"
            kept.append(Finding(MORE, severity, (), f"{count:,} more {what} not listed", fix, count=count))
    return tuple(kept)


def render(findings: Iterable[Finding], origins: Origins, *, show_dropped: bool = False) -> str:
    """All findings as text: the file's dialect, the findings with errors first, and a closing line that counts them.

    Args:
        show_dropped: list the fields that findings show on request.
    """
    ordered = sorted(findings, key=lambda f: SEVERITIES.index(f.severity))
    numbers = {severity: sum(f.count for f in ordered if f.severity == severity) for severity in SEVERITIES}
    counts = [f"{n:,} {name}{'' if n == 1 else 's'}" for name, n in numbers.items() if n]
    listed = " and ".join(filter(None, [", ".join(counts[:-1]), *counts[-1:]])) or "nothing found"
    told = (_render(f, origins, show_dropped) for f in ordered)
    return "\n\n".join(filter(None, [origins.said_first, *told, f"{origins.file}: {listed}"]))


def as_json(findings: Iterable[Finding], origins: Origins) -> list[dict[str, object]]:
    """All findings as plain values, for programs."""
    return [
        {
            "rule": finding.rule,
            "severity": finding.severity,
            "fields": [_field_json(path, value, origins) for path, value in finding.found],
            "why": finding.why,
            "fix": finding.fix,
        }
        for finding in sorted(findings, key=lambda f: SEVERITIES.index(f.severity))
    ]


def _field_json(path: str, value: object, origins: Origins) -> dict[str, object]:
    origin = origins.near(path) if value is ABSENT else origins.of(path)
    file, line = origins.file_and_line(path)
    return {"path": path, "value": _plain(value), "origin": origin, "file": file} | ({"line": line} if line else {})


def _plain(value: object) -> object:
    """A value as JSON has it: whole, and text only where JSON has no such value."""
    if isinstance(value, BaseModel):
        return _plain(value.model_dump())
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if value is ABSENT or value is None or (isinstance(value, float) and not math.isfinite(value)):
        return None if value is ABSENT or value is None else str(value)
    return value if isinstance(value, str | int | float) else show_value(value)


def _render(finding: Finding, origins: Origins, show_dropped: bool) -> str:
    lines = [f"{finding.severity} [{finding.rule}] {finding.why}"]
    if finding.shows == "on-request" and not show_dropped:
        return printable(f"{lines[0]} (--show-dropped lists them)")
    shown_fields = {"fields": _MAX_FIELDS, "on-request": len(finding.found), "line": 0}[finding.shows]
    for path, value in finding.found[:shown_fields]:
        shown = printable(path)  # a newline in a key makes no line
        if value is ABSENT:
            lines.append(f"    {shown}  ({ABSENT.value}; {origins.near(path)})")
        else:
            lines.append(f"    {shown} = {show_value(value)}  ({origins.of(path)})")
    if finding.shows == "fields" and (more := len(finding.found) - shown_fields) > 0:
        lines.append(f"    and {more:,} more {'field' if more == 1 else 'fields'}")
    if finding.fix:
        lines.append(f"    fix: {finding.fix}")
    return "\n".join(printable(line) for text in lines for line in text.split("\n"))


def show_value(value: object) -> str:
    """A value as a YAML user knows it, cut to a readable length."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    text = value if isinstance(value, str) and value else repr(list(value) if isinstance(value, tuple) else value)
    text = printable(text)
    return text if len(text) <= _MAX_VALUE else f"{text[: _MAX_VALUE - 3]}..."
