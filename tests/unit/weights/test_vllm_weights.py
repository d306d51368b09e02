"""Calls of the channel against a small HTTP server, with refusals that a real one cannot give on demand."""

from __future__ import annotations

import asyncio
import json
import re
import runpy
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
import torch

from roll_r3.engines.sample import SampleError
from roll_r3.engines.vllm.server import PLUGIN_PATH
from roll_r3.engines.vllm.strategy import VllmStatus
from roll_r3.engines.vllm.weights import VllmWeightChannel
from roll_r3.errors import EngineError
from roll_r3.weights.target import ServerTarget

KEY = "a-very-secret-key"


@contextmanager
def serving(refusing: str = "") -> Iterator[tuple[list[tuple[str, Any]], ServerTarget]]:
    """Yield the calls as they come, and a target; `refusing` is the path of the refused call."""
    calls: list[tuple[str, Any]] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            assert self.headers["Authorization"] == f"Bearer {KEY}"
            calls.append((self.path, json.loads(self.rfile.read(int(self.headers["Content-Length"])))))
            refused = self.path == refusing
            payload = json.dumps({"error": {"message": "no memory"}} if refused else {"message": "ok"}).encode()
            self.send_response(500 if refused else 200)
            self.send_header("Content-Length", str(len(payload)))
            self.end_headers()
            self.wfile.write(payload)

        def log_message(self, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield calls, ServerTarget("engine 0", "127.0.0.1", server.server_port, KEY, tp_size=1, dtype="bfloat16")
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@pytest.fixture(autouse=True)
def without_group(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(VllmWeightChannel, "_join", lambda self: None)


OPENED = [
    ("/pause?mode=abort", {}),
    ("/update_weight_version", {"new_version": "7-incomplete"}),
    ("/start_weight_update", {}),
]
CLOSED = [("/finish_weight_update", {"weight_version": "7"}), ("/resume", {})]


def test_an_engine_is_paused_and_marked_before_the_first_tensor_and_goes_on_after_the_last():
    with serving() as (calls, target):
        channel = VllmWeightChannel([target], device="cpu")
        channel.begin(7)
        assert calls == OPENED
        channel.end()
    assert calls == OPENED + CLOSED


def update_nothing(channel: VllmWeightChannel) -> None:
    channel.begin(7)
    channel.end()


@pytest.mark.parametrize("path", [path for path, _ in OPENED + CLOSED])
def test_a_refusal_is_an_error_that_quotes_it_and_the_engine_stays_paused(path):
    with serving(path) as (calls, target):
        channel = VllmWeightChannel([target], device="cpu")
        with pytest.raises(EngineError, match=rf"engine 0 refused {re.escape(path)} \(500\).*no memory") as caught:
            update_nothing(channel)
        assert KEY not in str(caught.value)
        assert calls[-1][0] == path, "nothing is called afterwards, /resume least of all"
        with pytest.raises(EngineError, match="earlier weight update failed"):
            channel.begin(8)


def test_weights_are_sent_as_they_come():
    weights = [(name, torch.zeros(2, dtype=torch.bfloat16)) for name in ("kv_a_proj_with_mqa", "b", "q_a_proj")]
    buckets = VllmWeightChannel([], device="cpu").buckets(weights, 8)
    assert [[name for name, _ in bucket] for bucket in buckets] == [["kv_a_proj_with_mqa", "b"], ["q_a_proj"]]


ReceivedNames = runpy.run_path(str(PLUGIN_PATH / "roll_r3_vllm" / "received.py"))["ReceivedNames"]


def test_a_tensor_that_comes_twice_is_refused():
    names = ReceivedNames()
    names.begin()
    names.add(["a", "b"])
    with pytest.raises(ValueError, match="b came twice"):
        names.add(["c", "b"])
    names.begin()
    names.add(["b"])


def test_every_update_brings_what_the_first_whole_one_brought():
    names = ReceivedNames()
    names.begin()
    names.add(["x"])  # never finished
    names.begin()
    names.add(["a.bias", "b.bias", "c"])
    assert (names.missing(), names.ending_in(".bias")) == ([], 2)
    names.finish()
    for _ in range(2):
        names.begin()
        names.add(["c", "d"])
        assert (names.missing(), names.ending_in(".bias")) == (["a.bias", "b.bias"], 0)
        names.finish()


@pytest.mark.parametrize("text", [b"x", b"{}", b"[]", b"null", b"\xff", b"[" * 100_000, b'{"weight_version": 4}'])
def test_an_answer_without_a_version_is_a_failed_sample(text):
    class Client:
        async def get(self, path: str, timeout_s: float) -> bytes:
            return text

    with pytest.raises(SampleError, match="does not give the version of the weights"):
        asyncio.run(VllmStatus().why_closed(Client(), 4))


def test_the_version_of_other_weights_can_be_shown():
    class Client:
        async def get(self, path: str, timeout_s: float) -> bytes:
            return b'{"weight_version": "\\u001b[2J' + b"x" * 100_000 + b'"}'

    why = asyncio.run(VllmStatus().why_closed(Client(), 4))
    assert "weights of version \\x1b[2Jx" in why and why.isprintable() and len(why) < 1000
