"""Supported SGLang releases."""

from __future__ import annotations

from packaging.version import InvalidVersion, Version

from roll_r3.errors import EngineError

MINIMUM = Version("0.5.12")
TESTED = Version("0.5.23")
RETURNS_KEPT = Version("0.5.23")
"""First release known to return exactly the set that a token was sampled from. Some earlier ones reconstruct it after
sampling."""


def returns_kept(text: str) -> bool:
    """Return True if a release accepted by `check_version` returns the kept tokens of truncated sampling."""
    return Version(text) >= RETURNS_KEPT


def check_version(text: str) -> str | None:
    """Return a warning about a release, or None.

    Raises:
        EngineError: a too old release, or text without a version.
    """
    try:
        version = Version(text)
    except InvalidVersion as error:
        raise EngineError(f"SGLang's version {text!r} cannot be read: {error}") from error
    if version < MINIMUM:
        raise EngineError(
            f"SGLang {version} is too old: {MINIMUM} or later is needed. 0.5.7 to 0.5.10.post1 return the "
            f"routes of another request if flagged and unflagged requests share a batch, and earlier releases record "
            f"no routes. Install sglang=={TESTED}, or point strategy_config.python at an interpreter that has it"
        )
    if version > TESTED:
        return f"SGLang {version} is newer than {TESTED}, the tested release"
    return None
