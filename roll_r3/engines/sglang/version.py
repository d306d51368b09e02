"""Which SGLang releases this strategy works with."""

from __future__ import annotations

from packaging.version import InvalidVersion, Version

from roll_r3.errors import EngineError

MINIMUM = Version("0.5.12")
TESTED = Version("0.5.23")


def check_version(text: str) -> str | None:
    """What to warn about, or None.

    Raises:
        EngineError: a release before the window, or text that is no version.
    """
    try:
        version = Version(text)
    except InvalidVersion as error:
        raise EngineError(f"SGLang calls its version {text!r}, which cannot be read: {error}") from error
    if version < MINIMUM:
        raise EngineError(
            f"SGLang {version} is too old: {MINIMUM} or later is needed. 0.5.7 to 0.5.10.post1 give a request the "
            f"routes of another one when flagged and unflagged requests share a batch, and earlier releases record no "
            f"routes. Install sglang=={TESTED}, or point strategy_config.python at an interpreter that has it"
        )
    if version > TESTED:
        return f"SGLang {version} is newer than {TESTED}, the release that this strategy was tested with"
    return None
