"""RAY_ADDRESS without a cluster: a message in time, with the reason."""

from __future__ import annotations

import socket
import time
from collections.abc import Iterator

import pytest

from roll_r3.cluster import address
from roll_r3.errors import ConfigError, LostWorkerError


@pytest.fixture
def silent() -> Iterator[int]:
    """Port that accepts connections and sends nothing."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server.getsockname()[1]


def free_port(host: str) -> int:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as probe:
        probe.bind((host, 0))
        return int(probe.getsockname()[1])


def test_nothing_listens_there() -> None:
    for host in ("127.0.0.1", "::1"):
        where = f"[{host}]:{free_port(host)}" if ":" in host else f"{host}:{free_port(host)}"
        began = time.monotonic()
        with pytest.raises(LostWorkerError) as caught:
            address.check_answers(where)
        assert time.monotonic() - began < 5
        said = str(caught.value)
        assert said.startswith(f"the Ray cluster of RAY_ADDRESS={where} cannot be joined: ConnectionRefusedError")
        assert f"tried: a TCP connection to {host} port" in said
        assert "ray start --head" in said


def test_a_name_that_stands_for_nothing() -> None:
    with pytest.raises(LostWorkerError, match=r"cannot be joined: gaierror: .*\ntried: a TCP connection to head\.inv"):
        address.check_answers("head.invalid:6379")


def test_a_name_server_that_does_not_answer_has_a_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(address, "CONNECT_TIMEOUT", -0.8)
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: time.sleep(5))
    began = time.monotonic()
    with pytest.raises(LostWorkerError, match="no answer within 0 s"):
        address.check_answers("head.example:6379")
    assert time.monotonic() - began < 4


def test_who_accepts_and_is_no_ray_has_a_limit(monkeypatch: pytest.MonkeyPatch, silent: int) -> None:
    """Check the limit for a server other than Ray; Ray's own limit, in its client, is a multiple of it."""
    monkeypatch.setattr(address, "GcsClient", lambda address: time.sleep(5))
    monkeypatch.setattr(address, "ANSWER_TIMEOUT", 0.2)
    with pytest.raises(LostWorkerError, match=f"no answer.*\ntried: a question to Ray's head at 127.0.0.1:{silent}"):
        address.check_answers(f"127.0.0.1:{silent}")
    assert address.ANSWER_TIMEOUT < 60


def test_auto_without_a_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    def nothing(_: str) -> str:
        raise ConnectionError("Could not find any running Ray instance")

    monkeypatch.setattr(address.services, "canonicalize_bootstrap_address", nothing)
    with pytest.raises(LostWorkerError, match="RAY_ADDRESS=auto cannot be joined: no Ray runs on this machine"):
        address.check_answers("auto")


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("ray://head:10001", "the address of a Ray Client server cannot be used"),
        ("head", r"RAY_ADDRESS=head must be HOST:PORT"),
        ("head:ray", r"must be HOST:PORT.*Must be an integer"),
    ],
)
def test_what_is_no_address_is_a_mistake(given: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        address.check_answers(given)


@pytest.mark.parametrize(("given", "found"), [("", ""), ("local", ""), ("127.0.0.1:6379", "127.0.0.1:6379")])
def test_no_address_and_local_are_a_ray_of_its_own(monkeypatch: pytest.MonkeyPatch, given: str, found: str) -> None:
    monkeypatch.setenv("RAY_ADDRESS", given)
    assert address.given_address() == found
