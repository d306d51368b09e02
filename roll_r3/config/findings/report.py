"""Findings about a configuration, and their text for people and programs."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import Literal

from pydantic import BaseModel

from roll_r3.config.dialect import Dialect
from roll_r3.config.findings.readable import printable
from roll_r3.config.secrets import hidden
from roll_r3.config.tree import overlap
from roll_r3.errors import ConfigError

Severity = Literal["error", "warning", "note"]
SEVERITIES: tuple[Severity, ...] = ("error", "warning", "note")
"""Most severe first."""
MORE = "more-findings"
"""Id of the finding in place of unlisted ones."""
_FILE_AND_LINE = re.compile(r"(?!override )(.*?):(\d+)(?:, from |$)")
_MAX_VALUE = 80
"""Largest number of characters shown of a value."""
MAX_FINDINGS = 200
"""Largest number of findings listed per severity."""
_MAX_FIELDS = 20
"""Largest number of fields shown of a finding."""


class _Absent(Enum):
    ABSENT = "not given"


ABSENT = _Absent.ABSENT
"""Value of a field missing in the YAML."""


@dataclass(frozen=True)
class Finding:
    """One mistake in a configuration.

    Example:
        >>> finding = Finding("vpp-needs-pp", "error", (("a.vpp", 2), ("a.pp", 1)), why="...", fix="...")
        >>> finding.path
        'a.vpp'
    """

    rule: str
    """Id of the rule or of the kind of mistake; stable, for searches."""
    severity: Severity
    found: tuple[tuple[str, object], ...]
    """(dotted path, value) of each field involved, the one to change first; empty for the file as a whole. Secrets are
    replaced."""
    why: str
    """Reason, as one sentence."""
    fix: str = ""
    """Remedy, empty if `why` includes it."""
    depends: tuple[str, ...] = ()
    """Dotted paths of further fields involved, `*` any key; not shown."""
    count: int = 1
    """Number of findings it stands for, see `limited`."""
    shows: Literal["fields", "on-request", "line"] = "fields"
    """Fields in the text: the first ones, all on request (see `render`), or none if the reason names them."""

    def __post_init__(self) -> None:
        found = tuple((path, hidden(path, _as_written(value))) for path, value in self.found)
        object.__setattr__(self, "found", found)

    @property
    def path(self) -> str:
        """Dotted path of the field to change; empty for the file as a whole."""
        return self.found[0][0] if self.found else ""

    def concerns(self, path: str) -> bool:
        """Return true if the value at `path`, or one inside or around it, is involved."""
        return any(overlap(mine, path) for mine in (*(p for p, _ in self.found), *self.depends))


@dataclass(frozen=True)
class Origins:
    """Origin of each value of a configuration."""

    file: str
    places: Mapping[str, str] = field(default_factory=dict)
    """Dotted path -> `file:line`, or the override as typed. Without the fields left at their defaults."""
    dialect: Dialect | None = None
    """Dialect of the file; None for an unreadable file."""

    @property
    def headline(self) -> str:
        """First line of a report; empty for an unreadable file."""
        return self.dialect.line(printable(self.file)) if self.dialect else ""

    def of(self, path: str) -> str:
        """Return the place of the value at `path`; "default" if it was not given."""
        return self.places.get(path, "default")

    def near(self, path: str) -> str:
        """Return the place of `path`, or of the innermost given section around it."""
        while path and path not in self.places:
            path = path.rpartition(".")[0]
        return self.places.get(path, self.file)

    def file_and_line(self, path: str) -> tuple[str, int | None]:
        """Return the file of `path`, and the line of it or of the section around it; None: not in a file."""
        match = _FILE_AND_LINE.match(self.near(path))
        return (match[1], int(match[2])) if match else (self.file, None)


class InvalidConfigError(ConfigError):
    """Configuration with mistakes: `findings` for programs, the text for people."""

    def __init__(self, findings: Iterable[Finding], origins: Origins) -> None:
        self.findings = tuple(findings)
        self.origins = origins
        super().__init__(render(self.findings, origins))


def has_errors(findings: Iterable[Finding]) -> bool:
    """Return true if a finding stops a run."""
    return any(finding.severity == "error" for finding in findings)


def limited(findings: Iterable[Finding]) -> tuple[Finding, ...]:
    """Return the first `MAX_FINDINGS` of each severity, in their order, and a finding with the number of the others."""
    kept: list[Finding] = []
    listed = dict.fromkeys(SEVERITIES, 0)
    left = dict.fromkeys(SEVERITIES, 0)
    for finding in findings:
        if finding.rule != MORE and listed[finding.severity] < MAX_FINDINGS:
            listed[finding.severity] += 1
            kept.append(finding)
        else:
            left[finding.severity] += finding.count
    for severity, count in left.items():
        if count:
            what = f"{severity} is" if count == 1 else f"{severity}s are"
            fix = f"fix the first {MAX_FINDINGS}, and check again"
            kept.append(Finding(MORE, severity, (), f"{count:,} more {what} not listed", fix, count=count))
    return tuple(kept)


def render(findings: Iterable[Finding], origins: Origins, *, show_dropped: bool = False) -> str:
    """Return all findings as text: the dialect, the findings with errors first, and a line with their numbers.

    Args:
        show_dropped: list the fields of findings with `shows` "on-request".
    """
    ordered = sorted(findings, key=lambda f: SEVERITIES.index(f.severity))
    numbers = {severity: sum(f.count for f in ordered if f.severity == severity) for severity in SEVERITIES}
    counts = [f"{n:,} {name}{'' if n == 1 else 's'}" for name, n in numbers.items() if n]
    listed = " and ".join(filter(None, [", ".join(counts[:-1]), *counts[-1:]])) or "nothing found"
    texts = (_render(f, origins, show_dropped) for f in ordered)
    return "\n\n".join(filter(None, [origins.headline, *texts, f"{origins.file}: {listed}"]))


def as_json(findings: Iterable[Finding], origins: Origins) -> list[dict[str, object]]:
    """Return all findings as plain values, for programs."""
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
    """Return a value for JSON, uncut; as text if JSON has no such value."""
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
        shown = printable(path)  # escapes newlines in keys
        if value is ABSENT:
            lines.append(f"    {shown}  ({ABSENT.value}; {origins.near(path)})")
        else:
            lines.append(f"    {shown} = {show_value(value)}  ({origins.of(path)})")
    if finding.shows == "fields" and (more := len(finding.found) - shown_fields) > 0:
        lines.append(f"    and {more:,} more {'field' if more == 1 else 'fields'}")
    if finding.fix:
        lines.append(f"    fix: {finding.fix}")
    return "\n".join(printable(line) for text in lines for line in text.split("\n"))


def _as_written(value: object) -> object:
    """Return a value with its sections as dicts of the fields that were given."""
    if isinstance(value, BaseModel):
        return {
            name: _as_written(getattr(value, name))
            for name in type(value).model_fields
            if name in value.model_fields_set
        }
    if isinstance(value, dict):
        return {key: _as_written(item) for key, item in value.items()}
    return [_as_written(item) for item in value] if isinstance(value, list | tuple) else value


def show_value(value: object) -> str:
    """Return a value as written in YAML, cut to a readable length."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    text = value if isinstance(value, str) and value else repr(list(value) if isinstance(value, tuple) else value)
    text = printable(text[: _MAX_VALUE + 1])  # escapes only make it longer
    return text if len(text) <= _MAX_VALUE else f"{text[: _MAX_VALUE - 3]}..."
