"""A look at the cluster of RAY_ADDRESS before it is joined: Ray alone takes a quarter of an hour to give one up."""

from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import Callable

from ray._private import services
from ray._raylet import GcsClient  # type: ignore[attr-defined]  # its stub lacks it

from roll_r3.errors import ConfigError, LostWorkerError

VARIABLE = "RAY_ADDRESS"
CONNECT_TIMEOUT = 10.0
"""Seconds for the name and the TCP connection together."""
ANSWER_TIMEOUT = 45.0
"""Seconds that the head has for its first answer."""


def given_address() -> str:
    """Address of the cluster in the environment; empty: the run starts a Ray of its own."""
    address = os.environ.get(VARIABLE, "")
    return "" if address == "local" else address


def check_answers(address: str) -> None:
    """Raise unless a Ray head answers at the address.

    Raises:
        ConfigError: no run can join such an address.
        LostWorkerError: nothing answers in time, or something other than Ray.
    """
    if "://" in address:
        raise ConfigError(
            f"{VARIABLE}={address}: the address of a Ray Client server cannot be used, since its driver is not part of "
            "the cluster. Start the run on a node of the cluster, with the address of its head: HOST:6379, or auto"
        )
    host, port = _resolved(address)
    _connect(address, host, port)
    _ask(address, f"[{host}]:{port}" if ":" in host else f"{host}:{port}")


def _resolved(address: str) -> tuple[str, int]:
    try:
        found = services.canonicalize_bootstrap_address("auto") if address == "auto" else address
        assert found is not None, "auto is a cluster or an error"
        host, port = services.extract_ip_port(found)
    except ConnectionError as error:
        raise _dead(address, "no Ray runs on this machine", "looked for its processes here") from error
    except ValueError as error:
        raise ConfigError(
            f"{VARIABLE}={address} must be HOST:PORT of the cluster's head, [ADDRESS]:PORT for IPv6, or auto: {error}"
        ) from error
    return host, port


def _connect(address: str, host: str, port: int) -> None:
    began = time.monotonic()

    def connect() -> None:
        failure: OSError | None = None
        for family, kind, protocol, _, where in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM):
            left = began + CONNECT_TIMEOUT - time.monotonic()
            try:
                with socket.socket(family, kind, protocol) as connection:
                    connection.settimeout(max(0.1, left))
                    connection.connect(where)
                return
            except OSError as error:
                failure = error
        raise failure or OSError("the name stands for no address")

    _within(CONNECT_TIMEOUT + 1.0, connect, address, f"a TCP connection to {host} port {port}")


def _ask(address: str, where: str) -> None:
    def ask() -> None:
        GcsClient(address=where)  # asks for the cluster's id

    _within(ANSWER_TIMEOUT, ask, address, f"a question to Ray's head at {where}, which accepts connections")


def _within(seconds: float, act: Callable[[], None], address: str, tried: str) -> None:
    """Run in a thread, and abandon a thread without an end: neither a name server nor Ray has a limit."""
    failures: list[Exception] = []
    done = threading.Event()

    def run() -> None:
        try:
            act()
        except Exception as error:  # noqa: BLE001  what Ray or the resolver raises is said
            failures.append(error)
        done.set()

    threading.Thread(target=run, name="ray-address", daemon=True).start()
    if not done.wait(seconds):
        raise _dead(address, f"no answer within {seconds:.0f} s", tried)
    if failures:
        raise _dead(address, f"{type(failures[0]).__name__}: {failures[0]}", tried) from failures[0]


def _dead(address: str, why: str, tried: str) -> LostWorkerError:
    return LostWorkerError(
        f"the Ray cluster of {VARIABLE}={address} cannot be joined: {why}\ntried: {tried}\n"
        f"Start the cluster (ray start --head, then ray start --address=HOST:6379 on the other nodes), write its head "
        f"in {VARIABLE}, or unset {VARIABLE} to run on this machine alone"
    )
