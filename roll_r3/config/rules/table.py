"""Form of the rule table: a row has its fields, its condition, the reason, a fix, and two examples.

Severity: an error cannot start, cannot learn, or would compute something else than written; a warning runs as written,
but wastes something or is probably a mistake; a note only informs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from roll_r3.config.derived import (
    MegatronWorker,
    ModelWorker,
    changed,
    megatron_workers,
    model_workers,
    values_at,
)
from roll_r3.config.findings.report import Finding, Severity, show_value
from roll_r3.config.pipeline import RLVRConfig
from roll_r3.config.tree import join
from roll_r3.errors import ConfigError

Verdict = bool | str
"""True or text if a rule is violated; the text has the figures."""
Example = tuple[str, ...]
"""Overrides (`a.b.c=value`) on the smallest configuration, `roll_r3.config.rules.example.MINIMAL`."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """One row of the table."""

    id: str
    fields: tuple[str, ...]
    """Dotted paths of the fields to show, the one to change first; `*` is every key."""
    why: str
    fix: str
    wrong: Example
    """Configuration rejected by this row."""
    right: Example
    """Similar configuration accepted by all rows."""
    severity: Severity = "error"
    only_warns: Callable[[RLVRConfig], bool] | None = None
    """Condition under which a violation of an error row is a warning, since the configuration may run as written."""
    depends: tuple[str, ...] = ()
    """Further fields used by the verdict, not shown."""

    @property
    def severities(self) -> str:
        """Possible severities of a violation, as text."""
        return self.severity if self.only_warns is None else f"{self.severity} or warning"

    def finding(self, config: RLVRConfig, verdict: Verdict, role: str = "") -> Finding:
        """Return the finding about a violation of this row.

        Args:
            role: value of `{role}` in fields; without `{role}` in any of them, prefix of all fields.
        """
        if any("{role}" in field for field in self.fields + self.depends):
            fields, depends = ([field.format(role=role) for field in some] for some in (self.fields, self.depends))
        else:
            fields, depends = ([join(role, field) for field in some] for some in (self.fields, self.depends))
        why = self.why if verdict is True else f"{self.why} ({verdict})"
        found = tuple(item for field in fields for item in _shown(config, field))
        severity = "warning" if self.only_warns is not None and self.only_warns(config) else self.severity
        return Finding(self.id, severity, found, why, self.fix, tuple(depends))

    def require(self, config: RLVRConfig, verdict: Verdict, role: str = "") -> None:
        """Raise ConfigError with the text of the row if the verdict is a violation."""
        if verdict:
            finding = self.finding(config, verdict, role)
            values = ", ".join(f"{path} = {show_value(value)}" for path, value in finding.found)
            raise ConfigError(f"{finding.why}; {finding.fix} ({values})")


def _shown(config: RLVRConfig, field: str) -> list[tuple[str, object]]:
    """Return the shown values of a field: with `*` only changed ones, or else the first."""
    values = values_at(config, field)
    return ([item for item in values if changed(config, item[0])] or values[:1]) if "*" in field else values


@dataclass(frozen=True, kw_only=True)
class Rule(Row):
    """Row about the whole configuration."""

    violates: Callable[[RLVRConfig], Verdict]

    def check(self, config: RLVRConfig) -> Iterator[Finding]:
        """Yield one finding if `config` violates the rule."""
        if verdict := self.violates(config):
            yield self.finding(config, verdict)


@dataclass(frozen=True, kw_only=True)
class RoleRule(Row):
    """Row about the whole configuration and each of the `model_workers`.

    `fields` are relative to the role, or contain `{role}`.
    """

    violates: Callable[[RLVRConfig, ModelWorker], Verdict]

    def check(self, config: RLVRConfig) -> Iterator[Finding]:
        """Yield one finding for each role that violates the rule."""
        for role, worker in model_workers(config).items():
            if verdict := self.violates(config, worker):
                yield self.finding(config, verdict, role)


@dataclass(frozen=True, kw_only=True)
class LayoutRule(Row):
    """Row about each of the `megatron_workers`. `fields` as in a `RoleRule`."""

    violates: Callable[[MegatronWorker], Verdict]

    def check(self, config: RLVRConfig) -> Iterator[Finding]:
        """Yield one finding for each role that violates the rule."""
        for role, worker in megatron_workers(config).items():
            if verdict := self.violates(worker):
                yield self.finding(config, verdict, role)


AnyRule = Rule | RoleRule | LayoutRule


def check_rows(config: RLVRConfig, rules: Iterable[AnyRule]) -> list[Finding]:
    """Return every violation of `rules`, in their order."""
    return [finding for rule in rules for finding in rule.check(config)]


def remainder(whole: int, parts: int, what: str) -> Verdict:
    """Return the verdict on the division of `whole` into `parts`; `what` is the noun for parts."""
    return f"{whole} / {parts} {what} leaves {whole % parts}" if whole % parts else False


def unread(
    id: str,
    field: str,
    switch: str,
    is_read: Callable[[RLVRConfig], bool],
    fix: str,
    *,
    wrong: Example,
    right: Example,
    depends: tuple[str, ...] = (),
    severity: Severity = "error",
) -> Rule:
    """Return a rule about a field changed without effect, since its condition `is_read` is false.

    Args:
        severity: an error if the field would change training; else a warning.
    """
    return Rule(
        id=id,
        fields=(field, switch),
        why="this setting has no effect here",
        fix=fix,
        wrong=wrong,
        right=right,
        depends=depends,
        violates=lambda config: changed(config, field) and not is_read(config),
        severity=severity,
    )
