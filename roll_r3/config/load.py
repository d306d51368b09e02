"""Loading of a YAML file and overrides into a typed configuration: all mistakes at once, with their places.

A wrong value is removed and the rest is read on, so one run reports the mistakes of every stage. Only the YAML file is
read: no environment, no clock, no device.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from roll_r3.config.dialect import given
from roll_r3.config.findings.report import ABSENT, MAX_FINDINGS, Finding, InvalidConfigError, Origins, limited
from roll_r3.config.pipeline import RLVRConfig
from roll_r3.config.reading.disk import MISSING, why_no_file
from roll_r3.config.reading.explain import explain, misread_values
from roll_r3.config.reading.field_paths import annotations_at, is_section, members
from roll_r3.config.reading.overrides import apply
from roll_r3.config.reading.yaml_file import parse_yaml
from roll_r3.config.translator import NoTranslator, Translator, Tree
from roll_r3.config.tree import Keys, at, dotted, is_at, remove

MAX_BYTES = 1 << 20
"""Size limit of a file."""
_OWN = NoTranslator()
_MAX_ROUNDS = 100
"""Limit on rounds of removing wrong values and validating the rest."""


@dataclass(frozen=True)
class LoadedConfig:
    """Typed configuration, the origins of its values, and the mistakes found while loading."""

    config: RLVRConfig
    """If there are errors in `findings`, removed values have their defaults here."""
    origins: Origins
    findings: tuple[Finding, ...] = ()
    doubtful: frozenset[str] = frozenset()
    """Dotted paths of removed values: rules about them cannot be checked."""


def load(path: Path, overrides: Sequence[str] = (), translator: Translator = _OWN) -> LoadedConfig:
    """Read, override, interpolate and validate a configuration. Rules between fields follow in `rules`.

    Args:
        path: the YAML file.
        overrides: `a.b.c=value`, applied in order. The value is YAML and replaces the old one. List items have
            numbers (`device_mapping.0=3`); missing sections are created. `a.b.c=null` removes the key, as if it were
            not in the file; it sets null where null differs from a missing field.
        translator: reader of files in another dialect. Without it, only a file in roll_r3's own schema can be read.

    Raises:
        InvalidConfigError: no configuration can be made from the file, or it has more than `MAX_FINDINGS` mistakes;
            reading stops there.
    """
    text, findings = _read(path)
    if text is None:
        raise InvalidConfigError(findings, Origins(str(path)))
    return load_text(text, str(path), overrides, translator)


def load_text(text: str, file: str, overrides: Sequence[str] = (), translator: Translator = _OWN) -> LoadedConfig:
    """Do the same as `load`, for text read from `file`."""
    data, places, found = _parse(text, file)
    if data is None:
        raise InvalidConfigError(limited(found), Origins(file, places))
    draft = _Draft(data, file, places, found, translator)
    for override in overrides:
        draft.set(override)
    draft.decide()
    draft.resolve()
    draft.translate()
    config = draft.validated()
    return LoadedConfig(config, draft.origins, limited(draft.findings), frozenset(draft.doubtful))


class _Draft:
    """Configuration before it is typed: wrong values are noted and removed."""

    def __init__(
        self, data: dict[str, Any], file: str, places: dict[str, str], findings: list[Finding], translator: Translator
    ) -> None:
        self.data = data
        self.places = places
        self.findings: list[Finding] = []
        self.doubtful: set[str] = set()
        self._around: set[str] = set()
        """Paths in `doubtful`, and those of the sections around them."""
        self._file = file
        self._translator = translator
        self.dialect = translator.dialect_of(data)
        """Decided by the file alone: no override changes it, except `dialect=`."""
        self._note(findings)

    @property
    def origins(self) -> Origins:
        return Origins(self._file, self.places, self.dialect)

    def set(self, override: str) -> None:
        """Apply one `a.b.c=value`."""
        if findings := apply(override, self.data, self.places, self._translator.is_key):
            self._note(findings)
            self._doubt(override.partition("=")[0])

    def decide(self) -> None:
        """Take an override of `dialect` into account.

        Raises:
            InvalidConfigError: the translator rejects the file.
        """
        self.dialect = given(self.data, self.dialect)
        if rejected := self._translator.reject(self.data, self.places, self.dialect):
            finding, self.dialect = rejected
            raise InvalidConfigError([finding], self.origins)

    def resolve(self) -> None:
        """Replace includes and every `${section.field}`."""
        self._take(self._translator.resolve(self.data, self.places))

    def translate(self) -> None:
        """Replace keys of another dialect by roll_r3's own."""
        self._take(self._translator.translate(self.data, self.places, self.dialect))

    def _take(self, tree: Tree) -> None:
        self.data, self.places = tree.data, tree.places
        self._note(tree.findings)
        self.leave_out(tree.wrong)

    def _note(self, findings: Sequence[Finding]) -> None:
        """Note findings about values already removed. Raises InvalidConfigError if there are too many."""
        self.findings += findings
        self._doubt(*(path for finding in findings if finding.severity == "error" for path, _ in finding.found))
        self._require_few()

    def leave_out(self, wrong: Sequence[tuple[Keys, Finding]]) -> None:
        """Note findings, except at places with an earlier finding, and remove their values.

        Raises:
            InvalidConfigError: there are too many.
        """
        self.findings += [finding for _, finding in wrong if not self._is_doubtful(finding.path)]
        self._require_few()
        for keys, finding in wrong:
            if finding.found[0][1] is ABSENT:
                self._fill_in(keys)
            elif is_at(self.data, keys):
                remove(self.data, keys)
            self._doubt(finding.path, dotted(keys))

    def _doubt(self, *paths: str) -> None:
        """Mark the values at `paths` as unknown."""
        self.doubtful.update(paths)
        self._around.update(outer for path in paths for outer in _sections_of(path))

    def _is_doubtful(self, path: str) -> bool:
        """Return true if the value at `path`, one inside it, or a section around it is already removed."""
        return path in self._around or not self.doubtful.isdisjoint(_sections_of(path))

    def _require_few(self) -> None:
        # Each finding costs time in every later stage, and nobody reads this many.
        if sum(finding.severity == "error" for finding in self.findings) > MAX_FINDINGS:
            raise InvalidConfigError(limited(self.findings), self.origins)

    def validated(self) -> RLVRConfig:
        """Return the typed configuration of the remaining values."""
        self.leave_out(misread_values(self.data))
        for _ in range(_MAX_ROUNDS):
            try:
                return RLVRConfig.model_validate(self.data)
            except ValidationError as error:
                self.leave_out(explain(error, self.data))
        raise AssertionError(f"mistakes are left after {_MAX_ROUNDS} rounds: {self.findings[-1]}")

    def _fill_in(self, keys: Keys) -> None:
        """Set a placeholder for a required field, so that the rest can be validated."""
        kinds = [kind for annotation in annotations_at(dotted(keys)) for kind in members(annotation)]
        placeholder: object = {} if any(is_section(kind) for kind in kinds) else "missing"
        at(self.data, keys[:-1])[keys[-1]] = 1 if {int, float}.intersection(kinds) else placeholder


def _sections_of(path: str) -> list[str]:
    """Return `path` and the paths of the sections around it."""
    keys = path.split(".")
    return [".".join(keys[:depth]) for depth in range(1, len(keys) + 1)]


def _read(path: Path) -> tuple[str | None, list[Finding]]:
    """Return the file's text, or None and a finding."""
    if (why := why_no_file(path)) not in ("", MISSING):
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
        return None, [_file_finding(f"{path} is larger than {MAX_BYTES} bytes, too large for a configuration")]
    return text, []


def _parse(text: str, file: str) -> tuple[dict[str, Any] | None, dict[str, str], list[Finding]]:
    """Return the top-level mapping, `file:line` of every key, and findings; None: no mapping can be read."""
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
