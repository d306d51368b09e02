"""Answers of a weight update's receiving end to calls from others than a trainer."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Iterator
from datetime import timedelta

import pytest
import torch
from torch.distributed import TCPStore

from roll_r3.engines.hf import receiver as module
from roll_r3.engines.hf.receiver import MAX_BODY, WeightReceiver

UPDATE = {"names": [], "dtypes": [], "shapes": [], "weight_version": "1-incomplete"}


@pytest.fixture
def receiver() -> Iterator[WeightReceiver]:
    receiver = WeightReceiver({"w": torch.zeros(2)}, threading.Lock(), "127.0.0.1")
    yield receiver
    receiver.close()


def call(
    receiver: WeightReceiver, body: bytes, *, path: str = "/flush_cache", key: str | None = None, length: object = None
) -> tuple[int, str]:
    """Return (status, message) of a call with `body`, declared as `length` long, then silence."""
    lines = [f"POST {path} HTTP/1.0", f"Content-Length: {len(body) if length is None else length}"]
    if key is not None:
        lines.append(f"Authorization: Bearer {key}")
    with socket.create_connection(("127.0.0.1", receiver.port), timeout=10) as connection:
        connection.sendall("\r\n".join([*lines, "", ""]).encode() + body)
        answer = b""
        while part := connection.recv(4096):
            answer += part
    head, _, text = answer.partition(b"\r\n\r\n")
    return int(head.split()[1]), json.loads(text).get("message", "")


@pytest.mark.parametrize("key", [None, "", "wrong"])
def test_of_a_caller_without_the_key_no_body_is_read(receiver: WeightReceiver, key: str | None) -> None:
    assert call(receiver, b"", key=key, length=1 << 40) == (401, "wrong key")


@pytest.mark.parametrize(
    ("length", "status", "said"),
    [
        (MAX_BODY + 1, 413, f"a request of {MAX_BODY + 1} bytes"),
        ("9" * 5000, 413, "a request of 999"),
        (-1, 400, "'-1', which is no number of bytes"),
        ("many", 400, "'many', which is no number of bytes"),
    ],
)
def test_a_length_that_cannot_be_is_refused(receiver: WeightReceiver, length: object, status: int, said: str) -> None:
    found, message = call(receiver, b"", key=receiver.key, length=length)
    assert found == status and said in message


def test_a_caller_that_falls_silent_is_let_go(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "REQUEST_TIMEOUT", 0.2)
    receiver = WeightReceiver({"w": torch.zeros(2)}, threading.Lock(), "127.0.0.1")
    with socket.create_connection(("127.0.0.1", receiver.port), timeout=10) as connection:
        head = f"POST / HTTP/1.0\r\nAuthorization: Bearer {receiver.key}\r\nContent-Length: 9\r\n\r\n"
        connection.sendall(head.encode())
        assert connection.recv(1) == b""
    receiver.close()


@pytest.mark.parametrize(
    ("body", "said"),
    [(b"{", "is no JSON:"), (b"\xff", "is no JSON:"), (b"[]", "is no JSON object")],
)
def test_a_body_that_is_no_request_is_refused(receiver: WeightReceiver, body: bytes, said: str) -> None:
    status, message = call(receiver, body, key=receiver.key)
    assert status == 400 and said in message


@pytest.mark.parametrize(
    ("path", "request_", "said"),
    [
        ("/update_weights_from_distributed", UPDATE, "ValueError: no group was joined: /init_weights_update_group"),
        ("/update_weights_from_distributed", {}, ""),
        (
            "/init_weights_update_group",
            {"master_address": "127.0.0.1", "master_port": "no number", "world_size": 2},
            "TypeError: ",
        ),
    ],
)
def test_whatever_fails_is_answered(
    receiver: WeightReceiver, path: str, request_: dict[str, object], said: str
) -> None:
    status, message = call(receiver, json.dumps(request_).encode(), path=path, key=receiver.key)
    assert status == 400 and said in message
    assert call(receiver, b"{}", key=receiver.key) == (200, ""), "it goes on"
    assert call(receiver, b"{}", path="/other", key=receiver.key) == (404, "no such call")


def test_nesting_without_end_is_refused(receiver: WeightReceiver) -> None:
    status, message = call(receiver, b"[" * 100_000, key=receiver.key)
    assert status == 400 and "is no JSON" in message


@pytest.fixture
def joined(receiver: WeightReceiver) -> Iterator[WeightReceiver]:
    """Receiver in a group of one: it broadcasts the memory's own content to itself."""
    store = TCPStore("127.0.0.1", 0, None, True, timedelta(seconds=20), wait_for_workers=False)
    request = {"master_address": "127.0.0.1", "master_port": store.port, "rank_offset": 0, "world_size": 1}
    assert receiver.answer("/init_weights_update_group", request | {"backend": "gloo", "group_name": "g"})[0] == 200
    yield receiver
    receiver.answer("/destroy_weights_update_group", {})
    del store


ONE = {"names": ["w"], "dtypes": ["float32"], "shapes": [[2]], "weight_version": "1-incomplete"}


@pytest.mark.parametrize(
    "changes",
    [
        {"dtypes": []},
        {"names": ["w", "w"], "dtypes": ["float32"] * 2, "shapes": [[2]] * 2},
        {"weight_version": "1"},
        {"weight_version": 1},
        {"dtypes": ["save"]},
        {"shapes": [[2.0]]},
        {"names": ["x"]},
    ],
)
def test_an_update_that_is_refused_changes_nothing(joined: WeightReceiver, changes: dict[str, object]) -> None:
    joined._missing.clear()  # as between two updates
    path = "/update_weights_from_distributed"
    assert joined.answer(path, ONE | changes)[0] == 400
    assert joined.version == "0"
    assert joined.answer(path, ONE)[0] == 200
    assert joined.version == "1-incomplete"
