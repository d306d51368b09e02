"""The form of the rule table: a row names fields, when they clash, why, what to write instead, and shows both.

Severity: an error cannot start, cannot learn, or would compute something else than is written; a warning runs as it is
written, but costs something for nothing or is probably not meant; a note only informs.
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
from roll_r3.config.pipeline import RLVRConfig
from roll_r3.config.report import Finding, Severity, show_value
from roll_r3.config.tree import join
from roll_r3.errors import ConfigError

Verdict = bool | str
"""Whether a rule is violated; text says so too, and gives the figures that make it plain."""
Example = tuple[str, ...]
"""Overrides (`a.b.c=value`) on the smallest configuration, `roll_r3.config.rules.example.MINIMAL`."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """What every row of the table says."""

    id: str
    fields: tuple[str, ...]
    """Dotted paths of the fields to show, the one to change first; `*` is every key."""
    why: str
    fix: str
    wrong: Example
    """A configuration that this row refuses."""
    right: Example
    """A near one that no row refuses."""
    severity: Severity = "error"
    only_warns: Callable[[RLVRConfig], bool] | None = None
    """Condition under which a violation of an error row is a warning: the configuration may run as it is written."""
    depends: tuple[str, ...] = ()
    """Further fields that the verdict depends on, too many to show."""

    @property
    def severities(self) -> str:
        """Those that a violation may have, in words."""
        return self.severity if self.only_warns is None else f"{self.severity} or warning"

    def finding(self, config: RLVRConfig, verdict: Verdict, role: str = "") -> Finding:
        """What a violation of this row is reported as.

        Args:
            role: what `{role}` stands for; what fields are within where none of them says `{role}`.
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
        """Raise ConfigError, in the words of the row, where a verdict says that it is violated."""
        if verdict:
            finding = self.finding(config, verdict, role)
            values = ", ".join(f"{path} = {show_value(value)}" for path, value in finding.found)
            raise ConfigError(f"{finding.why}; {finding.fix} ({values})")


def _shown(config: RLVRConfig, field: str) -> list[tuple[str, object]]:
    """What a report shows of a field: of one with `*` only what differs from the defaults, if anything does."""
    values = values_at(config, field)
    return ([item for item in values if changed(config, item[0])] or values[:1]) if "*" in field else values


@dataclass(frozen=True, kw_only=True)
class Rule(Row):
    """One row about the whole configuration."""

    violates: Callable[[RLVRConfig], Verdict]

    def check(self, config: RLVRConfig) -> Iterator[Finding]:
        """Yield one finding if `config` violates the rule."""
        if verdict := self.violates(config):
            yield self.finding(config, verdict)


@dataclass(frozen=True, kw_only=True)
class RoleRule(Row):
    """One row about the whole configuration and each role whose ranks run the model.

    `fields` are within the role, or say with `{role}` where it stands.
    """

    violates: Callable[[RLVRConfig, ModelWorker], Verdict]

    def check(self, config: RLVRConfig) -> Iterator[Finding]:
        """Yield one finding for each role that violates the rule."""
        for role, worker in model_workers(config).items():
            if verdict := self.violates(config, worker):
                yield self.finding(config, verdict, role)


@dataclass(frozen=True, kw_only=True)
class LayoutRule(Row):
    """One row about each of these roles that Megatron runs. `fields` as of a `RoleRule`."""

    violates: Callable[[MegatronWorker], Verdict]

    def check(self, config: RLVRConfig) -> Iterator[Finding]:
        """Yield one finding for each role that violates the rule."""
        for role, worker in megatron_workers(config).items():
            if verdict := self.violates(worker):
                yield self.finding(config, verdict, role)


AnyRule = Rule | RoleRule | LayoutRule


def check_rows(config: RLVRConfig, rules: Iterable[AnyRule]) -> list[Finding]:
    """Every violation of `rules`, in their order."""
    return [finding for rule in rules for finding in rule.check(config)]


def remainder(whole: int, parts: int, what: str) -> Verdict:
    """The verdict on `whole` things that should divide over `parts`."""
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
    """A field that is read only under a condition, and was changed outside it.

    Args:
        severity: an error where training would be another one, had the field been read; else a warning.
    """
    return Rule(
        id=id,
        fields=(field, switch),
        why="as things stand, nothing would read this setting",
        fix=fix,
        wrong=wrong,
        right=right,
        depends=depends,
        violates=lambda config: changed(config, field) and not is_read(config),
        severity=severity,
    )
