"""A server's command line and environment, as far as they do not depend on the engine."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from roll_r3.config.strategies import ServerConfig

EVERY_ADDRESS = ("0.0.0.0", "::")
"""Hosts that a server listens on but that nobody can connect to from elsewhere."""

CPU_SAMPLES = 64
"""Samples that an engine on a CPU decodes at once, and whose longest its cache holds, unless the configuration says how
many."""

Argument = str | int | float | bool | None

_OURS = ("TORCHELASTIC_", "RAY_AUTH_")
_RANK_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def losing_routes(config: ServerConfig, reasons: Mapping[str, str]) -> list[str]:
    """One message for each entry of `server_args` that has a reason there."""
    return [f"server_args.{name}: {reasons[name]}" for name in config.server_args if name in reasons]


def refused(config: ServerConfig, reasons: Mapping[str, str], known: Collection[str], engine: str) -> list[str]:
    """One message for each other entry of `server_args` that cannot be. Empty when all is well.

    Args:
        reasons: argument -> why it is refused.
        known: further arguments that are refused elsewhere.
        engine: its name, for messages.
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
            reason = f"{engine} takes it for {' or '.join(whole[:3])}: write the whole name"
        else:
            reason = reasons.get(name)
        if reason:
            problems.append(f"server_args.{name}: {reason}")
    return problems


def command_line(arguments: Mapping[str, Argument], *, negated: Collection[str] = ()) -> list[str]:
    """Arguments as flags: True is a bare one; False and None are left out.

    Args:
        negated: names that, where they are False, become `--no-name` instead.
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
    """An environment without a trainer's place in its world, and without the key to Ray, which are not the server's."""
    return {
        name: value for name, value in inherited.items() if name not in _RANK_VARIABLES and not name.startswith(_OURS)
    }
