"""Command line and environment of a server: the parts common to all engines."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from roll_r3.config.strategies import ServerConfig

EVERY_ADDRESS = ("0.0.0.0", "::")
"""Hosts for a server to bind, but not for other nodes to connect to."""

CPU_SAMPLES = 64
"""Default number of samples decoded at once on a CPU. The cache has room for as many of the longest samples."""

Argument = str | int | float | bool | None

_OURS = ("TORCHELASTIC_", "RAY_AUTH_")
_RANK_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def losing_routes(config: ServerConfig, reasons: Mapping[str, str]) -> list[str]:
    """Return one message for each entry of `server_args` listed in `reasons`."""
    return [f"server_args.{name}: {reasons[name]}" for name in config.server_args if name in reasons]


def refused(config: ServerConfig, reasons: Mapping[str, str], known: Collection[str], engine: str) -> list[str]:
    """Return one message for each other refused entry of `server_args`.

    Args:
        reasons: argument -> reason of the refusal.
        known: further arguments, refused elsewhere.
        engine: name of the engine, for messages.
    """
    typed = set(type(config).model_fields) - {"server_args"}
    whole_names = {*typed, *reasons, *known}
    problems = []
    for name in config.server_args:
        if not name.isidentifier():
            reason: str | None = "write the name with underscores and without leading dashes"
        elif name in typed:
            reason = f"write strategy_config.{name} instead"
        elif name not in whole_names and (whole := sorted(other for other in whole_names if other.startswith(name))):
            reason = f"{engine} reads it as {' or '.join(whole[:3])}: write the whole name"
        else:
            reason = reasons.get(name)
        if reason:
            problems.append(f"server_args.{name}: {reason}")
    return problems


def command_line(arguments: Mapping[str, Argument], *, negated: Collection[str] = ()) -> list[str]:
    """Return arguments as flags: True becomes a bare flag; False and None are left out.

    Args:
        negated: names whose False becomes `--no-name` instead.
    """
    line: list[str] = []
    for name, value in arguments.items():
        flag = name.replace("_", "-")
        if value is False and name in negated:
            line.append(f"--no-{flag}")
        elif value is not None and value is not False:
            line.append(f"--{flag}")
            if value is not True:
                line.append(str(value))
    return line


def without_rank(inherited: Mapping[str, str]) -> dict[str, str]:
    """Return an environment without a trainer's rank and Ray's key; they are not for the server."""
    return {
        name: value for name, value in inherited.items() if name not in _RANK_VARIABLES and not name.startswith(_OURS)
    }
