"""Supported vLLM releases."""

from __future__ import annotations

from packaging.version import InvalidVersion, Version

from roll_r3.errors import EngineError

TESTED = Version("0.32.0")


def check_version(text: str, *, device: str) -> str | None:
    """Return a warning about a release, or None.

    Args:
        text: installed release, with or without a local part such as `+cpu`.
        device: "cpu" accepts the tested release only; "cuda" refuses builds for CPUs.

    Raises:
        EngineError: a release outside the window, a build for CPUs on GPUs, or text without a version.
    """
    try:
        version = Version(text)
    except InvalidVersion as error:
        raise EngineError(f"vLLM's version {text!r} cannot be read: {error}") from error
    if device == "cuda" and "cpu" in (version.local or "").split("."):
        raise EngineError(
            f"vLLM {version} is built for CPUs and sees no GPU. Take the environment away and run "
            "`make vllm-env VLLM_KIND=gpu`, or name an interpreter that has vLLM for GPUs in strategy_config.python"
        )
    release = Version(version.public)
    if release == TESTED:
        return None
    if device == "cpu":
        raise EngineError(
            f"vLLM {version} is not {TESTED}: on a CPU the model runner that records routes fits this release "
            "only. Run `make vllm-env`"
        )
    if release < TESTED:
        raise EngineError(
            f"vLLM {version} is too old: {TESTED} or later is needed for its update API and routed experts. "
            f"Install vllm=={TESTED} where strategy_config.python points"
        )
    return f"vLLM {version} is newer than {TESTED}, the tested release"
