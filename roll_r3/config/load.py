"""From a YAML file and overrides to a typed configuration: every mistake at once, with its place.

What is wrong is left out and the rest goes on, so that one run names the mistakes of every stage. Nothing but the YAML
file is read: no environment, no clock, no device.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from roll_r3.config.dialect import Dialect
from roll_r3.config.disk import NOTHING, why_no_file
from roll_r3.config.explain import annotations_at, explain, is_section, members, misread_values
from roll_r3.config.interpolate import resolve
from roll_r3.config.overrides import apply
from roll_r3.config.pipeline import RLVRConfig
from roll_r3.config.report import ABSENT, MAX_FINDINGS, Finding, InvalidConfigError, Origins, limited
from roll_r3.config.roll_yaml import (
    blame_includes,
    dialect_of,
    doubt,
    given,
    include_defaults,
    other_pipeline,
    translate,
)
from roll_r3.config.tree import Keys, at, dotted, leads_somewhere, remove
from roll_r3.config.yaml_file import parse_yaml

MAX_BYTES = 1 << 20
"""Largest file that is read."""
_MAX_ROUNDS = 100
"""How often what is wrong is taken out and the rest is looked at again."""


@dataclass(frozen=True)
class LoadedConfig:
    """A typed configuration, where its values came from, and what was wrong on the way."""

    config: RLVRConfig
    """With errors among `findings`, values that had to be left out are their defaults here."""
    origins: Origins
    findings: tuple[Finding, ...] = ()
    doubtful: frozenset[str] = frozenset()
    """Dotted paths of what was left out: nothing can be said about combinations with them."""


def load(path: Path, overrides: Sequence[str] = ()) -> LoadedConfig:
    """Read, override, interpolate and validate a configuration. Rules between fields come after, in `rules`.

    Args:
        path: the YAML file.
        overrides: `a.b.c=value`, applied in order. The value is read as YAML and replaces what stands there; list
            items are named by number (`device_mapping.0=3`); sections that are missing are made. `a.b.c=null` takes
            the key away, as if it were not in the file; where null is a value of its own, that is set.

    Raises:
        InvalidConfigError: the file is not one from which a configuration can be made at all, or has more than
            `MAX_FINDINGS` mistakes, after which nothing more is looked at.
    """
    text, findings = _read(path)
    if text is None:
        raise InvalidConfigError(findings, Origins(str(path)))
    return load_text(text, str(path), overrides)


def load_text(text: str, file: str, overrides: Sequence[str] = ()) -> LoadedConfig:
    """As `load`, of a text that was read from `file`."""
    data, places, found = _parse(text, file)
    if data is None:
        raise InvalidConfigError(limited(found), Origins(file, places))
    draft = _Draft(data, file, places, found)
    for override in overrides:
        draft.set(override)
    draft.decide()
    draft.include()
    draft.resolve()
    draft.translate()
    config = draft.validated()
    return LoadedConfig(config, draft.origins, limited(draft.findings), frozenset(draft.doubtful))


class _Draft:
    """A configuration on its way to its types: what is wrong is noted and taken out."""

    def __init__(self, data: dict[str, Any], file: str, places: dict[str, str], findings: list[Finding]) -> None:
        self.data = data
        self.places = places
        self.findings: list[Finding] = []
        self.doubtful: set[str] = set()
        self._around: set[str] = set()
        """The paths in `doubtful`, and those of the sections around them."""
        self._file = file
        self._includes: Any = None
        self._unknown_includes: list[Finding] = []
        self.dialect = dialect_of(data)
        """Decided by the file alone: no override changes it, but for `dialect=` itself."""
        self._note(findings)

    @property
    def origins(self) -> Origins:
        return Origins(self._file, self.places, self.dialect)

    def set(self, override: str) -> None:
        """Apply one `a.b.c=value`."""
        if findings := apply(override, self.data, self.places):
            self._note(findings)
            self._doubt(override.partition("=")[0])

    def decide(self) -> None:
        """Take an override of `dialect` into account.

        Raises:
            InvalidConfigError: the file is one of another pipeline of ROLL's.
        """
        self.dialect = given(self.data, self.dialect)
        other = None if self.dialect.given and not self.dialect.is_rolls else other_pipeline(self.data, self.places)
        if other is not None:
            signs = tuple(path for path, _ in other.found)
            self.dialect = self.dialect if self.dialect.is_rolls else Dialect("roll", rolls=signs)
            raise InvalidConfigError([other], self.origins)

    def include(self) -> None:
        """Take in what a `defaults:` list of Hydra's names."""
        self._includes = self.data.get("defaults")
        self.data, self.places, self._unknown_includes = include_defaults(self.data, self.places)

    def resolve(self) -> None:
        """Replace every `${section.field}`. Those that need an include which is not read are named with it."""
        self.data, unresolved = resolve(self.data, self.places)
        findings, unresolved, blamed = blame_includes(self.data, self._includes, self._unknown_includes, unresolved)
        for keys in blamed:
            remove(self.data, keys)
        self._note(findings)
        self.leave_out(unresolved)

    def translate(self) -> None:
        """Put roll_r3's own keys in the place of ROLL's."""
        unclear = doubt(self.data, self.places, self.dialect)
        self.data, self.places, findings = translate(self.data, self.places, self.dialect.name)
        self._note([*findings, *unclear])

    def _note(self, findings: Sequence[Finding]) -> None:
        """Note findings about values that are left out already. Raises InvalidConfigError where they are too many."""
        self.findings += findings
        self._doubt(*(path for finding in findings if finding.severity == "error" for path, _ in finding.found))
        self._require_few()

    def leave_out(self, wrong: Sequence[tuple[Keys, Finding]]) -> None:
        """Note what is wrong, unless something at the same place was noted before, and take the values out.

        Raises:
            InvalidConfigError: that is too much.
        """
        self.findings += [finding for _, finding in wrong if not self._is_doubtful(finding.path)]
        self._require_few()
        for keys, finding in wrong:
            if finding.found[0][1] is ABSENT:
                self._fill_in(keys)
            elif leads_somewhere(self.data, keys):
                remove(self.data, keys)
            self._doubt(finding.path, dotted(keys))

    def _doubt(self, *paths: str) -> None:
        """Nothing is known any more of the values at `paths`."""
        self.doubtful.update(paths)
        self._around.update(outer for path in paths for outer in _sections_of(path))

    def _is_doubtful(self, path: str) -> bool:
        """Whether the value at `path`, one inside it, or a section around it is left out already."""
        return path in self._around or not self.doubtful.isdisjoint(_sections_of(path))

    def _require_few(self) -> None:
        # Each of them costs time in every later stage, and nobody reads on.
        if sum(finding.severity == "error" for finding in self.findings) > MAX_FINDINGS:
            raise InvalidConfigError(limited(self.findings), self.origins)

    def validated(self) -> RLVRConfig:
        """The typed configuration of what is right."""
        self.leave_out(misread_values(self.data))
        for _ in range(_MAX_ROUNDS):
            try:
                return RLVRConfig.model_validate(self.data)
            except ValidationError as error:
                self.leave_out(explain(error, self.data))
        raise AssertionError(f"{_MAX_ROUNDS} rounds left something wrong: {self.findings[-1]}")

    def _fill_in(self, keys: Keys) -> None:
        """Something for a required field, so that the rest can be looked at."""
        kinds = [kind for annotation in annotations_at(dotted(keys)) for kind in members(annotation)]
        at(self.data, keys[:-1])[keys[-1]] = {} if any(is_section(kind) for kind in kinds) else "missing"


def _sections_of(path: str) -> list[str]:
    """`path` and the paths of the sections around it."""
    keys = path.split(".")
    return [".".join(keys[:depth]) for depth in range(1, len(keys) + 1)]


def _read(path: Path) -> tuple[str | None, list[Finding]]:
    """The file's text, or what is wrong with it."""
    if (why := why_no_file(path)) not in ("", NOTHING):
        return None, [_file_finding(f"{path} cannot be read: {why}")]
    try:
        with path.open("rb") as stream:
            raw = stream.read(MAX_BYTES + 1)
        text = raw.decode()
    except FileNotFoundError:
        return None, [_file_finding(f"{path} does not exist", "give --config the path of a YAML file")]
    except (OSError, ValueError) as error:
        return None, [_file_finding(f"{path} cannot be read: {error}")]
    if len(raw) > MAX_BYTES:
        return None, [_file_finding(f"{path} is larger than {MAX_BYTES} bytes: this is not a configuration")]
    return text, []


def _parse(text: str, file: str) -> tuple[dict[str, Any] | None, dict[str, str], list[Finding]]:
    """The top-level mapping, `file:line` of every key, and what is wrong; None: nothing can be made of it."""
    parsed = parse_yaml(text, file)
    data, findings = parsed.value, parsed.findings
    if isinstance(data, dict):
        return data, parsed.places, findings
    if not findings and data is None:
        findings = [_file_finding(f"{file} is empty", "start from a file in configs/")]
    elif not findings:
        kind = {list: "a list", str: "text", bool: "a boolean"}.get(type(data), "a number")
        findings = [_file_finding(f"{file} must hold `field: value` lines at its top level, not {kind}")]
    return None, parsed.places, findings


def _file_finding(why: str, fix: str = "") -> Finding:
    return Finding("file", "error", (), why, fix)
