"""What is wrong with a plan: mistakes that show only when it is known which device is on which node."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice

from roll_r3.config.derived import server, values_at, workers
from roll_r3.config.pipeline import RLVRConfig
from roll_r3.config.report import Finding, Severity
from roll_r3.config.rules.paths import ENGINE
from roll_r3.preflight.plan import Plan

LOOPBACK = ("127.0.0.1", "localhost", "::1")
PLAN_FINDINGS = {
    "engine-on-one-node": "the devices of an engine must share a node",
    "engines-beyond-loopback": "the trainer's first rank sends weights to every engine, and a loopback address cannot "
    "be reached from another node",
    "devices-unnamed": "a run reserves every device up to the highest number, those that no role names too",
}
"""Id of a finding -> why it is one."""
_SHOWN = 8
"""Numbers that a text lists."""


def plan_findings(config: RLVRConfig, plan: Plan) -> list[Finding]:
    """Everything that is wrong with a plan of a configuration."""
    return [*_scattered_engines(config, plan), *_engines_out_of_reach(config, plan), *_unnamed_devices(config, plan)]


def _scattered_engines(config: RLVRConfig, plan: Plan) -> Iterator[Finding]:
    scattered = [engine for engine in plan.engines if len(engine.nodes) > 1]
    if scattered:
        first = scattered[0]
        others = f" (and {len(scattered) - 1:,} more)" if len(scattered) > 1 else ""
        yield _finding(
            config,
            "engine-on-one-node",
            "error",
            ("actor_infer.device_mapping", f"{ENGINE}.tp_size"),
            f"engine {first.index}{others} takes devices {_listed(first.devices)}, on nodes {_listed(first.nodes)} of "
            f"{plan.devices_per_node}",
            "write a tp_size that divides the devices of a node, let actor_infer's devices start at the first of one, "
            "or say with --devices-per-node how many a node has",
        )


def _engines_out_of_reach(config: RLVRConfig, plan: Plan) -> Iterator[Finding]:
    settings = server(config)
    trainer = config.actor_train.device_mapping[0] // plan.devices_per_node
    beyond = [engine.index for engine in plan.engines if engine.devices[0] // plan.devices_per_node != trainer]
    if beyond and settings is not None and settings.host in LOOPBACK:
        yield _finding(
            config,
            "engines-beyond-loopback",
            "warning",
            (f"{ENGINE}.host", "actor_infer.device_mapping", "actor_train.device_mapping"),
            f"engines {_listed(beyond)} are not on node {trainer}",
            "write host: 0.0.0.0 (every address of an engine's node; its key protects it)",
        )


def _unnamed_devices(config: RLVRConfig, plan: Plan) -> Iterator[Finding]:
    named = {device for worker in workers(config).values() for device in worker.device_mapping}
    if unnamed := plan.devices - len(named):
        first = tuple(islice((device for device in range(plan.devices) if device not in named), _SHOWN))
        yield _finding(
            config,
            "devices-unnamed",
            "warning",
            tuple(f"{role}.device_mapping" for role in workers(config)),
            f"of {plan.devices:,} devices nobody uses {_listed(first, unnamed)}",
            "number the devices without gaps",
        )


def _finding(
    config: RLVRConfig, rule: str, severity: Severity, paths: tuple[str, ...], detail: str, fix: str
) -> Finding:
    found = tuple(found for path in paths for found in values_at(config, path))
    return Finding(rule, severity, found, f"{PLAN_FINDINGS[rule]}: {detail}", fix)


def _listed(numbers: list[int] | tuple[int, ...], count: int | None = None) -> str:
    """The first few of `count` numbers; None: of as many as are given."""
    left = (len(numbers) if count is None else count) - _SHOWN
    more = f" and {left:,} more" if left > 0 else ""
    return ", ".join(map(str, numbers[:_SHOWN])) + more
