"""Which vLLM releases this strategy works with."""

from __future__ import annotations

from packaging.version import InvalidVersion, Version

from roll_r3.errors import EngineError

TESTED = Version("0.32.0")


def check_version(text: str, *, device: str) -> str | None:
    """What to warn about, or None.

    Args:
        text: the installed release, with or without a local part such as `+cpu`.
        device: "cpu", where only the release that was tested runs; "cuda", where no build for CPUs does; or another.

    Raises:
        EngineError: a release outside the window, a build for CPUs that is to run on GPUs, or text that is no version.
    """
    try:
        version = Version(text)
    except InvalidVersion as error:
        raise EngineError(f"vLLM calls its version {text!r}, which cannot be read: {error}") from error
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
            f"vLLM {version} is not {TESTED}: on a CPU routes are recorded by a model runner that fits this release "
            "only. Run `make vllm-env`"
        )
    if release < TESTED:
        raise EngineError(
            f"vLLM {version} is too old: {TESTED} or later is needed, whose update API and routed experts this "
            f"strategy speaks. Install vllm=={TESTED} where strategy_config.python points"
        )
    return f"vLLM {version} is newer than {TESTED}, the release that this strategy was tested with"
