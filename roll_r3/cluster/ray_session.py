"""Ray for the time of a run: the cluster of RAY_ADDRESS, or one of its own on this machine, closed to others."""

from __future__ import annotations

import ipaddress
import logging
import os
import secrets
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import ray
from ray._private import auto_init_hook, ray_constants
from ray._private import utils as ray_utils
from ray.exceptions import RayError

from roll_r3.cluster.address import check_answers, given_address
from roll_r3.cluster.daemons import kill_started_in, shut_down
from roll_r3.cluster.folder import RayFolder
from roll_r3.cluster.placement import device_count
from roll_r3.config.pipeline import RLVRConfig
from roll_r3.errors import LostWorkerError, WorkerError

logger = logging.getLogger(__name__)

TOKEN_VARIABLE = "RAY_AUTH_TOKEN"
"""Environment variable with the token of Ray's processes."""
QUIET: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
LATE = 15.0
"""Seconds after which a Ray that did not start was late, on a busy machine, and not wrong: it is tried once more."""


@contextmanager
def ray_cluster(config: RLVRConfig, say: Callable[[str], None] = logger.warning) -> Iterator[None]:
    """Join the cluster of RAY_ADDRESS, or run one on this machine, closed to others, for the block's time.

    Args:
        say: shows a line to the person who started the run.

    Raises:
        ConfigError: RAY_ADDRESS cannot be joined.
        LostWorkerError: Ray itself did not start, or failed.
        WorkerError: Ray would listen on other addresses than loopback, or does not end.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    # otherwise a late thread would start another Ray, open to everyone, by any call
    auto_init_hook.enable_auto_connect = False
    address = given_address()
    with _joined(address) if address else _own(config, say):
        try:
            yield
        except RayError as error:
            raise LostWorkerError(f"Ray failed: {type(error).__name__}: {error}") from error


@contextmanager
def _joined(address: str) -> Iterator[None]:
    check_answers(address)
    try:
        with _sigterm_kept():
            ray.init(address="auto", **QUIET)
    except Exception as error:  # of any kind, bare ones too
        shut_down()
        raise LostWorkerError(
            f"the Ray cluster of RAY_ADDRESS={address} cannot be joined: {type(error).__name__}: {error}\n"
            "its own logs are in the newest directory under /tmp/ray, or under RAY_TMPDIR, of its nodes"
        ) from error
    try:
        yield
    finally:
        shut_down()


@contextmanager
def _own(config: RLVRConfig, say: Callable[[str], None]) -> Iterator[None]:
    # on one machine a lost connection is a dead server, for which this process would wait a minute
    os.environ.setdefault("RAY_gcs_rpc_server_reconnect_timeout_s", "10")
    # where memory runs out, the kernel kills a reward process (1000) before a rank, which Ray puts at 1000 too
    os.environ.setdefault("RAY_worker_oom_score_adjustment", "500")
    _close_to_others()
    began = time.monotonic()
    try:
        folder = _start(config)
    except LostWorkerError as error:
        seconds = time.monotonic() - began
        if seconds < LATE:
            raise
        say(f"Ray did not start within {seconds:.0f} s, and is tried once more: {str(error).splitlines()[0]}")
        folder = _start(config)
    try:
        _check_is_closed(ray.util.get_node_ip_address())
        yield
    finally:
        try:
            shut_down()
        finally:
            folder.remove()


def _start(config: RLVRConfig) -> RayFolder:
    """Start Ray here; return its directory.

    Raises:
        LostWorkerError: it did not start. Its logs are kept.
    """
    # a slot is a place to run, not a core: two ranks on one core are slow, not wrong
    cpus = max(device_count(config), os.cpu_count() or 1)
    here: dict[str, Any] = {"address": "local", "include_dashboard": False, "_node_ip_address": "127.0.0.1"}
    folder = None
    try:
        folder = RayFolder()
        with _sigterm_kept():
            ray.init(num_cpus=cpus, _temp_dir=folder.temp_dir, **here, **QUIET)
    except Exception as error:  # of any kind, bare ones too
        shut_down()
        hint = "it got no directory: see RAY_TMPDIR and TMPDIR"
        if folder is not None:
            kill_started_in(folder.path)
            folder.keep()
            hint = (
                f"its own logs are in {folder.path}; a machine on which its daemons do not start within half a minute "
                "is too busy for it"
            )
        raise LostWorkerError(f"Ray did not start here: {type(error).__name__}: {error}\n{hint}") from error
    except BaseException:  # a signal
        shut_down()
        if folder is not None:
            kill_started_in(folder.path)
            folder.remove()
        raise
    return folder


@contextmanager
def _sigterm_kept() -> Iterator[None]:
    """Keep this process's handler of SIGTERM while Ray starts and afterwards, even after a failed start.

    Ray would replace it, and exit at once with a status of its own. SIGTERM is not blocked instead, since Ray's daemons
    would inherit the mask.
    """
    handler, set_handler = signal.getsignal(signal.SIGTERM), ray_utils.set_sigterm_handler
    setattr(ray_utils, set_handler.__name__, lambda handler: None)
    try:
        yield
    finally:
        setattr(ray_utils, set_handler.__name__, set_handler)
        signal.signal(signal.SIGTERM, handler)


def _close_to_others() -> None:
    """Have the next cluster of this process listen on loopback alone, and ask for a token.

    A call to Ray carries pickles, so its sender runs code here. Other users of this machine reach loopback too, and do
    not know the token.
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
