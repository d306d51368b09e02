"""From a YAML file and overrides to a checked configuration: every mistake at once, with its place.

Nothing but the YAML file is read: no environment, no clock, no device.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from roll_r3.config.explain import explain, misread_values
from roll_r3.config.interpolate import resolve
from roll_r3.config.pipeline import RLVRConfig
from roll_r3.config.report import Finding, InvalidConfigError, Origins
from roll_r3.config.yaml_file import join, parse_yaml

MAX_BYTES = 4 << 20
"""Largest file that is read."""


@dataclass(frozen=True)
class LoadedConfig:
    """A configuration that every model accepts, and where its values came from."""

    config: RLVRConfig
    origins: Origins


def load_config(path: Path, overrides: Sequence[str] = ()) -> RLVRConfig:
    """As `load`, for callers that do not need to know where values came from."""
    return load(path, overrides).config


def load(path: Path, overrides: Sequence[str] = ()) -> LoadedConfig:
    """Read, override, interpolate and validate a configuration. Rules between fields come after, in `rules`.

    Args:
        path: the YAML file.
        overrides: `a.b.c=value`, applied in order. The value is read as YAML and replaces what stands there; list
            items are named by number (`device_mapping.0=3`); sections that are missing are made.

    Raises:
        InvalidConfigError: with all mistakes that a stage can see. Reading and overrides, interpolation, and types
            and names are three stages: each needs the one before.
    """
    data, places, findings = _read(path)
    origins = Origins(str(path), places)
    if not findings:
        for override in overrides:
            findings += _apply(override, data, places)
    if not findings:
        data, findings = resolve(data)
    if findings:
        raise InvalidConfigError(findings, origins)
    findings = misread_values(data)
    try:
        config = RLVRConfig.model_validate(data)
    except ValidationError as error:
        known = {f.path for f in findings}
        findings += [f for f in explain(error, data) if f.path not in known]
    if findings:
        raise InvalidConfigError(findings, origins)
    return LoadedConfig(config, origins)


def _read(path: Path) -> tuple[dict[str, Any], dict[str, str], list[Finding]]:
    """The file's top-level mapping, `file:line` of every key, and what is wrong."""
    try:
        with path.open("rb") as stream:
            raw = stream.read(MAX_BYTES + 1)
        text = raw.decode()
    except FileNotFoundError:
        return {}, {}, [_file_finding(f"{path} does not exist", "give --config the path of a YAML file")]
    except (OSError, ValueError) as error:
        return {}, {}, [_file_finding(f"{path} cannot be read: {error}")]
    if len(raw) > MAX_BYTES:
        return {}, {}, [_file_finding(f"{path} is larger than {MAX_BYTES} bytes: this is not a configuration")]
    data, places, findings = parse_yaml(text, str(path))
    if not findings and data is None:
        findings = [_file_finding(f"{path} is empty", "start from a file in configs/")]
    elif not findings and not isinstance(data, dict):
        kind = {list: "a list", str: "text", bool: "a boolean"}.get(type(data), "a number")
        findings = [_file_finding(f"{path} must hold `field: value` lines at its top level, not {kind}")]
    return data, places, findings


def _file_finding(why: str, fix: str = "") -> Finding:
    return Finding("file", "error", (), why, fix)


def _apply(override: str, data: dict[str, Any], places: dict[str, str]) -> list[Finding]:
    """Set one `a.b.c=value` in `data`, and its place in `places`; returns what is wrong with it."""
    path, equals, text = override.partition("=")
    keys = path.split(".")
    if not equals or not all(keys) or any(c.isspace() for c in path):
        fix = "write section.field=value, without spaces around ="
        return [Finding("override", "error", (), f"{override!r} is not an override", fix)]
    place = f"override {override}"
    value, inner_places, findings = parse_yaml(text, place, path)
    if findings:
        return findings
    *above, last = keys
    node: Any = data
    here = ""
    for key in above:
        if problem := _cannot_set(node, key, here, override):
            return [problem]
        inner = join(here, key)
        if isinstance(node, dict) and node.get(key) is None:
            node[key] = {}
            places[inner] = place
        node, here = node[int(key) if isinstance(node, list) else key], inner
    if problem := _cannot_set(node, last, here, override):
        return [problem]
    node[int(last) if isinstance(node, list) else last] = value
    for replaced in [p for p in places if p == path or p.startswith(f"{path}.")]:
        del places[replaced]
    places.update(dict.fromkeys([path, *inner_places], place))
    return []


def _cannot_set(node: Any, key: str, here: str, override: str) -> Finding | None:
    """What stops `key` from being set in `node`, which stands at `here`."""
    if isinstance(node, dict):
        return None
    if not isinstance(node, list):
        why = f"{override!r}: {here} holds a value, it is not a section, so nothing can be set inside it"
        return Finding("override", "error", ((here, node),), why, f"set {here} itself")
    if key.isdecimal() and int(key) < len(node):
        return None
    why = f"{override!r}: {here} is a list of {len(node)} items and {key} is none of them (they count from 0)"
    return Finding("override", "error", ((here, node),), why, f"set the whole list: {here}=[...]")
