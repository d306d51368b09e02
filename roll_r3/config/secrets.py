"""Values kept out of reports, saved configurations and logs: environment variables, keys and passwords."""

from __future__ import annotations

import re
from collections.abc import Mapping

HIDDEN = "<hidden>"
"""Text in place of a secret."""
_SECTIONS = ("system_envs", "tracker_kwargs")
"""Sections with values that are never reported."""
_KEYS = ("api_key", "judge_api_key", "login_kwargs")
"""Keys of ROLL and of trackers with a secret."""
_NAMES = re.compile(r"(KEY|TOKEN|SECRET|PASSWORD|PASSWD|CREDENTIALS?)(_|$)", re.IGNORECASE)
"""Part of a variable's name, up to an underscore or the end: TOKENIZERS_PARALLELISM is no secret."""
_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_USER_INFO = re.compile(r"://[^/@\s]*:[^/@\s]*@")
"""User and password in an address, as in http://user:password@proxy."""


def _has_password(text: str) -> bool:
    return _USER_INFO.search(text) is not None


def is_secret(name: str, value: str) -> bool:
    """Return true if a variable's name or its value looks like a secret."""
    return _NAMES.search(name) is not None or _has_password(value)


def names_variable(text: str) -> bool:
    """Return true if a text can be the name of an environment variable; a key in its place usually cannot."""
    return _VARIABLE.fullmatch(text) is not None


def masked(variables: Mapping[str, str]) -> dict[str, str]:
    """Return environment variables for a saved configuration, without secrets."""
    return {name: HIDDEN if is_secret(name, value) else value for name, value in variables.items()}


def is_hidden(path: str) -> bool:
    """Return true if the value at a dotted path is never reported."""
    keys = path.split(".")
    return keys[-1] in _KEYS or any(key in _SECTIONS for key in keys)


def hidden(path: str, value: object) -> object:
    """Return the value at a dotted path as a report may show it: of a hidden section the names alone."""
    if isinstance(value, str):
        key = path.endswith("api_key_env") and not names_variable(value)
        return HIDDEN if key or _has_password(value) or is_hidden(path) else value
    if isinstance(value, dict):
        return {key: hidden(f"{path}.{key}", inner) for key, inner in value.items()}
    return HIDDEN if isinstance(value, int | float | list | tuple) and is_hidden(path) else value


def hidden_override(override: str) -> str:
    """Return `a.b.c=value` as a report may show it."""
    path, equals, _ = override.partition("=")
    secret = _has_password(override) or any(key in override for key in (*_SECTIONS, *_KEYS))
    return f"{path.rstrip()}{equals}{HIDDEN}" if secret else override
