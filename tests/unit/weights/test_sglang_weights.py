"""Calls of the channel against a small HTTP server, with refusals that a real one cannot give on demand."""

from __future__ import annotations

import contextlib
import json
import pickle
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
import torch

from roll_r3.engines.sglang.weights import SglangWeightChannel
from roll_r3.errors import EngineError
from roll_r3.weights import channel as weights
from roll_r3.weights.channel import as_sent
from roll_r3.weights.target import ServerTarget

KEY = "a-very-secret-key"
GOOD = (200, {"success": True, "message": "ok"})
UPDATE = "/update_weights_from_distributed"


class Recorder:
    """Server without a group: `_set_version` needs none, so begin and end can be observed."""

    def __init__(self, answers: dict[str, tuple[int, Any]]) -> None:
        self.answers = answers
        self.calls: list[tuple[str, dict[str, Any], str]] = []


@contextmanager
def serving(answers: dict[str, tuple[int, Any]]) -> Iterator[tuple[Recorder, ServerTarget]]:
    recorder = Recorder(answers)

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            recorder.calls.append((self.path, body, self.headers["Authorization"]))
            status, answer = recorder.answers.get(self.path, GOOD)
            payload = json.dumps(answer).encode() if not isinstance(answer, bytes) else answer
            self.send_response(status)
            self.send_header("Content-Length", str(len(payload)))
            self.end_headers()
            self.wfile.write(payload)

        def log_message(self, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield recorder, target_at(server.server_port)
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def target_at(port: int) -> ServerTarget:
    return ServerTarget("engine 0", "127.0.0.1", port, KEY, tp_size=1, dtype="bfloat16")


def update_nothing(channel: SglangWeightChannel) -> None:
    channel.begin(1)
    channel.end()


@pytest.fixture
def without_group(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(SglangWeightChannel, "_join", lambda self: None)


@pytest.mark.usefixtures("without_group")
def test_the_version_is_marked_before_the_first_tensor_and_written_at_the_end() -> None:
    with serving({"/flush_cache": (200, b"Cache flushed.\n")}) as (recorder, target):
        channel = SglangWeightChannel([target], device="cpu")
        channel.begin(7)
        channel.end()
    assert [(path, body.get("weight_version")) for path, body, _ in recorder.calls] == [
        ("/begin_weight_update", None),
        (UPDATE, "7-incomplete"),
        (UPDATE, "7"),
        ("/end_weight_update", None),
        ("/flush_cache", None),
    ]
    assert {authorization for _, _, authorization in recorder.calls} == {f"Bearer {KEY}"}


@pytest.mark.usefixtures("without_group")
def test_a_release_without_sessions_is_updated_without() -> None:
    missing = (404, {"detail": "Not Found"})
    with serving({"/begin_weight_update": missing, "/end_weight_update": missing}) as (_, target):
        update_nothing(SglangWeightChannel([target], device="cpu"))


@pytest.mark.usefixtures("without_group")
@pytest.mark.parametrize(
    ("path", "answer"),
    [
        ("/begin_weight_update", (400, {"success": False, "message": "a session is already open"})),
        (UPDATE, (200, {"success": False, "message": "partially updated"})),
        (UPDATE, (404, {"detail": "Not Found"})),
        ("/end_weight_update", (500, b"Internal Server Error")),
        ("/flush_cache", (400, b"requests are running")),
    ],
)
def test_a_refusal_is_an_error_that_quotes_it_and_ends_the_channels_life(path: str, answer: tuple[int, Any]) -> None:
    with serving({path: answer}) as (_, target):
        channel = SglangWeightChannel([target], device="cpu")
        text = answer[1].decode() if isinstance(answer[1], bytes) else next(iter(reversed(answer[1].values())))
        with pytest.raises(EngineError, match=f"engine 0 refused {path}.*{text}") as caught:
            update_nothing(channel)
        assert KEY not in str(caught.value)
        with pytest.raises(EngineError, match="earlier weight update failed"):
            channel.begin(2)


def test_an_engine_that_is_gone_is_named() -> None:
    with serving({}) as (_, target):
        pass
    with pytest.raises(EngineError, match="engine 0 is not reachable"):
        SglangWeightChannel([target], device="cpu").begin(1)


def test_an_engine_that_refuses_the_group_is_named_at_once() -> None:
    refusal = (400, {"success": False, "message": "no such backend"})
    with serving({"/init_weights_update_group": refusal}) as (_, target):
        channel = SglangWeightChannel([target], device="cpu", join_timeout_s=30.0)
        with pytest.raises(EngineError, match="no such backend"):
            channel.begin(1)


def test_a_group_that_comes_about_after_an_engine_failed_to_join_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    engine_failed, left = threading.Event(), threading.Event()
    limits: list[float] = []

    def join_group(*_: object, timeout_s: float, **__: object) -> object:
        limits.append(timeout_s)
        assert engine_failed.wait(30)
        return "the group"

    def leave_group(group: object) -> None:
        assert group == "the group"
        left.set()

    monkeypatch.setattr(weights, "join_group", join_group)
    monkeypatch.setattr(weights, "leave_group", leave_group)
    with serving({"/init_weights_update_group": (400, {"success": False, "message": "no such backend"})}) as (
        _,
        target,
    ):
        channel = SglangWeightChannel([target], device="cpu", timeout_s=600.0, join_timeout_s=30.0)
        with pytest.raises(EngineError, match="no such backend"):
            channel.begin(1)
    assert not left.is_set()
    engine_failed.set()
    assert left.wait(30)
    assert limits == [30.0], "else a port is held for as long as a broadcast may take"


def test_tensors_are_sent_in_the_engines_precision_but_for_those_it_keeps_in_fp32() -> None:
    weight = torch.randn(4, 3).t()
    sent = as_sent("model.layers.0.mlp.gate.weight", weight, "bfloat16", "cpu")
    assert sent.dtype == torch.bfloat16
    assert sent.is_contiguous()
    assert as_sent("model.layers.3.mlp.gate.e_score_correction_bias", weight, "bfloat16", "cpu").dtype == torch.float32


def test_only_a_plain_success_counts() -> None:
    channel = SglangWeightChannel([], device="cpu")
    assert channel._succeeded('{"success": true}')
    assert channel._succeeded("Cache flushed.")
    assert not channel._succeeded('{"success": false}')
    assert not channel._succeeded('{"success": null}')
    for no_answer in ("[" * 100_000, '{"success": true'):
        assert not channel._succeeded(no_answer)


def test_a_target_travels_but_does_not_show_its_key() -> None:
    target = target_at(1)
    assert KEY not in repr(target)
    assert KEY not in str(target)
    assert pickle.loads(pickle.dumps(target)) == target


def test_of_an_answer_without_end_little_is_read() -> None:
    """Leave everything after it on the connection unread, too."""
    with socket.create_server(("127.0.0.1", 0)) as server:

        def endless() -> None:
            connection, _ = server.accept()
            with connection, contextlib.suppress(OSError):
                connection.recv(1 << 16)
                connection.sendall(b"HTTP/1.1 500 no\r\n\r\n")
                while True:
                    connection.sendall(b"x" * (1 << 20))

        threading.Thread(target=endless, daemon=True).start()
        channel = SglangWeightChannel([target_at(server.getsockname()[1])], device="cpu", timeout_s=20.0)
        with pytest.raises(EngineError, match="refused /flush_cache"):
            channel._post(target_at(server.getsockname()[1]), "/flush_cache", {})


@pytest.mark.parametrize("sent", [b"HTTP/1.1 500 no\r\n\r\n\x1b[2J\n", b"\x1b[2J\r\n\r\n"], ids=["a body", "no HTTP"])
def test_what_an_engine_says_can_be_shown(sent: bytes) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:

        def answer() -> None:
            connection, _ = server.accept()
            with connection:
                connection.recv(1 << 16)
                connection.sendall(sent)
                connection.shutdown(socket.SHUT_WR)
                with contextlib.suppress(OSError):
                    while connection.recv(1 << 16):  # closed before all was read, it would be reset
                        pass

        threading.Thread(target=answer, daemon=True).start()
        target = target_at(server.getsockname()[1])
        with pytest.raises(EngineError, match=r"/flush_cache.*\\x1b\[2J") as refused:
            SglangWeightChannel([target], device="cpu", timeout_s=20.0)._post(target, "/flush_cache", {})
        assert str(refused.value).isprintable()
