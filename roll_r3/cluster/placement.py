"""Places of processes: devices (GPUs, or CPU slots) are placement-group bundles, shared by roles."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import ray
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from roll_r3.cluster.daemons import vital
from roll_r3.config.pipeline import RLVRConfig
from roll_r3.config.rules.devices import GPUS_NOT_SHARED, shared_with_engines
from roll_r3.errors import ConfigError, LostWorkerError

SHARE = 0.01
"""Share of a device claimed by each process on it. Roles share devices, so the claim only decides the place."""
PLACEMENT_TIMEOUT = 300.0
"""Seconds to wait for the cluster to offer the devices."""
RETURN_TIMEOUT = 600.0
"""Seconds to wait for a cluster that lost a node to have enough devices again."""


@dataclass(frozen=True)
class Device:
    """One device of the run."""

    index: int
    """Its number in every `device_mapping`."""
    bundle: int
    node_id: str
    node_ip: str
    gpu_id: int | None
    """None: a CPU slot."""


@dataclass(frozen=True)
class Placement:
    """The devices of a run, by their number."""

    kind: str
    """"cuda" or "cpu"."""
    group: PlacementGroup
    devices: tuple[Device, ...]

    def node_of(self, device: int) -> str:
        """The name of a device's node."""
        at = self.devices[device]
        return f"{at.node_ip} ({at.node_id})"

    def options(self, device: int) -> dict[str, object]:
        """Return the Ray actor options for a process on a device."""
        share = {"num_gpus": SHARE, "num_cpus": SHARE} if self.kind == "cuda" else {"num_cpus": SHARE}
        strategy = PlacementGroupSchedulingStrategy(
            placement_group=self.group, placement_group_bundle_index=self.devices[device].bundle
        )
        return share | {"scheduling_strategy": strategy}


def device_count(config: RLVRConfig) -> int:
    """Return the number of devices named by the roles: one more than the highest."""
    roles = [config.actor_train, config.actor_infer, *([config.reference] if config.reference else [])]
    return 1 + max(max(role.device_mapping) for role in roles)


def resolve_device_kind(config: RLVRConfig) -> str:
    """Return the meaning of `device_type` on this cluster.

    Raises:
        ConfigError: cuda without any GPU, or the rules about GPUs refuse the configuration.
    """
    gpus = int(ray.cluster_resources().get("GPU", 0))
    if config.device_type == "cuda" and not gpus:
        raise ConfigError("device_type: cuda, but the cluster has no GPU; write auto or cpu")
    kind = "cuda" if gpus and config.device_type != "cpu" else "cpu"
    GPUS_NOT_SHARED.require(config, kind == "cuda" and shared_with_engines(config))
    return kind


@contextmanager
def place(config: RLVRConfig, *, again: str | None = None) -> Iterator[Placement]:
    """Reserve every device of the run for the block's time.

    Args:
        again: kind of the devices in an earlier attempt of the run. It waits for them, and takes no others.

    Raises:
        ConfigError: the cluster cannot offer enough devices.
        LostWorkerError: it could, and does not any more.
    """
    wanting = LostWorkerError if again else ConfigError
    kind, count = again or resolve_device_kind(config), device_count(config)
    resource = "GPU" if kind == "cuda" else "CPU"
    if again:
        _await_return(resource, count)
    have = int(ray.cluster_resources().get(resource, 0))
    if have < count:
        raise wanting(
            f"device_mapping names devices up to {count - 1}, but the cluster has {have} "
            f"({resource}s): use fewer, or add nodes"
        )
    bundle = {"GPU": 1, "CPU": 1} if kind == "cuda" else {"CPU": 1}
    group = placement_group([bundle] * count, strategy="PACK")
    try:
        if not group.wait(PLACEMENT_TIMEOUT):
            raise wanting(
                f"the cluster did not offer {count} {resource}s within {PLACEMENT_TIMEOUT:.0f} s: do others use it?"
            )
        yield Placement(kind, group, _number_devices(kind, group, count))
    finally:
        if not any(daemon.state == "gone" for daemon in vital()):  # else nobody would answer, for ever
            remove_placement_group(group)


def _await_return(resource: str, count: int) -> None:
    """Wait for lost devices. Raises LostWorkerError: no node with enough of them joined the cluster in time."""
    deadline = time.monotonic() + RETURN_TIMEOUT
    while (have := int(ray.cluster_resources().get(resource, 0))) < count:
        if time.monotonic() > deadline:
            raise LostWorkerError(
                f"the cluster has {have} {resource}s left of the {count} that the run needs, and no node joined it "
                f"within {RETURN_TIMEOUT:.0f} s"
            )
        time.sleep(1.0)


def _number_devices(kind: str, group: PlacementGroup, count: int) -> tuple[Device, ...]:
    """Ask each bundle for its place; number devices node by node, so that neighbours share a node."""
    probe = ray.remote(_where)
    found: Sequence[tuple[str, str, int | None]] = ray.get(
        [
            probe.options(
                num_cpus=SHARE,
                num_gpus=SHARE if kind == "cuda" else 0,
                scheduling_strategy=PlacementGroupSchedulingStrategy(
                    placement_group=group, placement_group_bundle_index=bundle
                ),
            ).remote(kind)
            for bundle in range(count)
        ]
    )
    first_seen = {node: i for i, node in reversed(list(enumerate(node for node, _, _ in found)))}
    order = sorted(range(count), key=lambda b: (first_seen[found[b][0]], found[b][2] or 0, b))
    return tuple(Device(index, bundle, *found[bundle]) for index, bundle in enumerate(order))


def _where(kind: str) -> tuple[str, str, int | None]:
    """Return, within a bundle, its node, the node's address and its GPU's id on that node."""
    context = ray.get_runtime_context()
    gpu = int(context.get_accelerator_ids()["GPU"][0]) if kind == "cuda" else None
    return context.get_node_id(), ray.util.get_node_ip_address(), gpu
