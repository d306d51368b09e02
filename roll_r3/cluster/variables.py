"""Environment variables of actors, from `system_envs`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from roll_r3.config.secrets import is_secret


def runtime_env(variables: Mapping[str, str], own: Mapping[str, str] | None = None) -> dict[str, Any]:
    """Return Ray's runtime environment of an actor: the variables of its process from the start.

    Secrets are left out, since Ray writes runtime environments into its logs. An actor sets all variables again as it
    is made, secrets included: those are read by calls, not at a process's start.

    Args:
        own: variables of the program itself. They take precedence.
    """
    shown = {name: value for name, value in variables.items() if not is_secret(name, value)} | {**(own or {})}
    return {"env_vars": shown} if shown else {}
