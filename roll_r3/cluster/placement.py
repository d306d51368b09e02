"""Which process runs where: devices (GPUs, or CPU slots) are placement-group bundles, roles share them."""

from __future__ import annotations

import ipaddress
import logging
import os
import secrets
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import ray
from ray._private import auto_init_hook, ray_constants
from ray._private import utils as ray_utils
from ray.exceptions import RayError
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from roll_r3.config.pipeline import RLVRConfig
from roll_r3.config.rules.devices import GPUS_NOT_SHARED, shared_with_engines
from roll_r3.errors import ConfigError, LostWorkerError, WorkerError

logger = logging.getLogger(__name__)

SHARE = 0.01
"""Of a device, claimed by each process on it: roles share devices, so the claim only decides the place."""
TOKEN_VARIABLE = "RAY_AUTH_TOKEN"
"""What Ray's processes know each other by."""
PLACEMENT_TIMEOUT = 300.0
"""Seconds to wait for the cluster to offer the devices."""
RETURN_TIMEOUT = 600.0
"""Seconds to wait for a cluster that lost a node to have as many devices as the run needs again."""


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
        """Ray actor options that put a process on a device."""
        share = {"num_gpus": SHARE, "num_cpus": SHARE} if self.kind == "cuda" else {"num_cpus": SHARE}
        strategy = PlacementGroupSchedulingStrategy(
            placement_group=self.group, placement_group_bundle_index=self.devices[device].bundle
        )
        return share | {"scheduling_strategy": strategy}


def device_count(config: RLVRConfig) -> int:
    """Devices that the roles name: one more than the highest number."""
    roles = [config.actor_train, config.actor_infer, *([config.reference] if config.reference else [])]
    return 1 + max(max(role.device_mapping) for role in roles)


@contextmanager
def ray_cluster(config: RLVRConfig) -> Iterator[None]:
    """Join the cluster that RAY_ADDRESS names, or run one on this machine, closed to others, for the block's time.

    Raises:
        LostWorkerError: Ray itself did not start, or failed.
        WorkerError: Ray would listen on other addresses than loopback.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    quiet = {"log_to_driver": False, "logging_level": logging.ERROR}
    address = os.environ.get("RAY_ADDRESS")
    # a thread that is late would start another Ray otherwise, open to everyone, by any call
    auto_init_hook.enable_auto_connect = False
    try:
        if address:
            with _sigterm_kept():
                ray.init(address="auto", **quiet)
        else:
            # on one machine a lost connection is a dead server, for which this process would wait a minute
            os.environ.setdefault("RAY_gcs_rpc_server_reconnect_timeout_s", "10")
            # where memory runs out, the kernel kills a reward process (1000) before a rank, which Ray puts at 1000 too
            os.environ.setdefault("RAY_worker_oom_score_adjustment", "500")
            # a slot is a place to run, not a core: two ranks on one core are slow, not wrong
            cpus = max(device_count(config), os.cpu_count() or 1)
            _close_to_others()
            here = {"address": "local", "include_dashboard": False, "_node_ip_address": "127.0.0.1"}
            with _sigterm_kept():
                ray.init(num_cpus=cpus, **here, **quiet)
    except Exception as error:  # of any kind, bare ones too
        ray.shutdown()
        raise LostWorkerError(
            (f"the Ray cluster of RAY_ADDRESS={address} cannot be joined" if address else "Ray did not start here")
            + f": {type(error).__name__}: {error}\nits own logs are in the newest directory under /tmp/ray, or under "
            "RAY_TMPDIR; a machine on which its daemons do not start within half a minute is too busy for it"
        ) from error
    try:
        if not address:
            _check_is_closed(ray.util.get_node_ip_address())
        yield
    except RayError as error:
        raise LostWorkerError(f"Ray failed: {type(error).__name__}: {error}") from error
    finally:
        ray.shutdown()


@contextmanager
def _sigterm_kept() -> Iterator[None]:
    """Whoever takes SIGTERM takes it while Ray starts too, and afterwards, whether it started or not.

    Ray would take it, and leave at once with a status of its own. It is not blocked instead, which Ray's daemons would
    inherit.
    """
    handler, set_handler = signal.getsignal(signal.SIGTERM), ray_utils.set_sigterm_handler
    setattr(ray_utils, set_handler.__name__, lambda handler: None)
    try:
        yield
    finally:
        setattr(ray_utils, set_handler.__name__, set_handler)
        signal.signal(signal.SIGTERM, handler)


def _close_to_others() -> None:
    """Have the next cluster that this process starts listen on loopback alone, and ask for a token.

    A call to Ray carries pickles: whoever may make one runs code here. Other users of this machine reach loopback too,
    and do not know the token.
    """
    # Unless clusters of several machines are off, Ray replaces 127.0.0.1 by this machine's address. It has read the
    # environment variable for that by now.
    ray_constants.ENABLE_RAY_CLUSTER = False
    # Ray would write a token of its own into the home directory, and use it for ever. A process reads it once, so it is
    # the same for all clusters that this process starts.
    os.environ.setdefault(TOKEN_VARIABLE, secrets.token_hex(32))
    if sys.platform == "linux":  # else gloo listens on the address that this machine's name stands for
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")


def _check_is_closed(address: str) -> None:
    if not ipaddress.ip_address(address).is_loopback:
        raise WorkerError(
            f"Ray {ray.__version__} would listen on {address}, though it was told to keep to loopback: use the release "
            "that roll_r3 pins, or start a cluster yourself (ray start) and name it in RAY_ADDRESS"
        )


def resolve_device_kind(config: RLVRConfig) -> str:
    """What `device_type` means on this cluster.

    Raises:
        ConfigError: cuda was asked for and there is no GPU, or the rules about GPUs refuse the configuration.
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
        again: the kind of the devices that the run had before it lost some: it waits for them, and takes no others.

    Raises:
        ConfigError: the cluster cannot offer so many devices.
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
        remove_placement_group(group)


def _await_return(resource: str, count: int) -> None:
    """Raises LostWorkerError: the cluster has not got so many any more, and no node joined it in time."""
    deadline = time.monotonic() + RETURN_TIMEOUT
    while (have := int(ray.cluster_resources().get(resource, 0))) < count:
        if time.monotonic() > deadline:
            raise LostWorkerError(
                f"the cluster has {have} {resource}s left of the {count} that the run needs, and no node joined it "
                f"within {RETURN_TIMEOUT:.0f} s"
            )
        time.sleep(1.0)


def _number_devices(kind: str, group: PlacementGroup, count: int) -> tuple[Device, ...]:
    """Ask each bundle where it is; number devices node by node, so that neighbours share a node."""
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
    """Runs in a bundle: its node, and its GPU's id on that node."""
    context = ray.get_runtime_context()
    gpu = int(context.get_accelerator_ids()["GPU"][0]) if kind == "cuda" else None
    return context.get_node_id(), ray.util.get_node_ip_address(), gpu
