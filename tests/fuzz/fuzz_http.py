"""Hostile answers on the line, below the JSON: what the rollout's client makes of a server that lies."""

from __future__ import annotations

import asyncio
import gzip
import threading
import zlib
from typing import Any

from fuzz_harness import Verdict, Wrong, mutated
from hypothesis import strategies as st

from roll_r3.strategies.rollout.client import ServerClient
from roll_r3.strategies.rollout.sampling import SampleError

TIMEOUT = 0.5
BOMB = gzip.compress(bytes(300 << 20), 1)
"""A few hundred kilobytes that unpack to 300 MiB."""
_LENGTHS = ["0", "-1", "5", "9" * 30, str(1 << 62), "1e3", "", "0x5", "5, 6", "+5"]
_ENCODINGS = ["gzip", "deflate", "br", "zstd", "x-unknown", "identity", "gzip, gzip"]


@st.composite
def _answers(draw: st.DrawFn) -> tuple[bytes, bytes]:
    """(what the server sends, the body in it that a client may return)"""
    body = draw(st.sampled_from([b"", b"{}", b"hello", b"x" * 5000]))
    good = b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(body) + body
    kind = draw(st.sampled_from(["good", "mutated", "length", "bomb", "encoding", "chunks", "headers", "status", "silent"]))
    if kind == "mutated":
        return draw(mutated(good)), body
    if kind == "length":
        return good.replace(b"Content-Length: %d" % len(body), b"Content-Length: " + draw(st.sampled_from(_LENGTHS)).encode()), body
    if kind in ("bomb", "encoding"):
        data = BOMB if kind == "bomb" else draw(st.sampled_from([gzip.compress(body), zlib.compress(body), body]))
        name = "gzip" if kind == "bomb" else draw(st.sampled_from(_ENCODINGS))
        return b"HTTP/1.1 200 OK\r\nContent-Encoding: %s\r\nContent-Length: %d\r\n\r\n" % (name.encode(), len(data)) + data, data
    if kind == "chunks":
        sizes = draw(st.lists(st.sampled_from([b"5", b"-5", b"5;x=" + b"y" * 9000, b"FFFFFFFFFFFFFFFFFF", b"zz", b"0", b""]), max_size=3))
        chunks = b"".join(size + b"\r\nhello\r\n" for size in sizes)
        return b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n" + chunks + b"0\r\n\r\n", b"hello" * len(sizes)
    if kind == "headers":
        flood = draw(st.sampled_from([b"A: " + b"b" * 100_000, b"A: b\r\n" * 20_000, b"\0: \0", b": x", b"A\r\n b", b"A: \xff"]))
        return b"HTTP/1.1 200 OK\r\n" + flood + b"\r\n\r\n", b""
    if kind == "status":
        line = draw(st.sampled_from([b"HTTP/1.1 999 ", b"HTTP/9.9 200 OK", b"HTTP/1.1 200", b"hello", b"HTTP/1.1 1e3 OK", b"",
                                     b"HTTP/1.1 302 F\r\nLocation: http://127.0.0.1:1/x", b"HTTP/1.1 500 \xff\xfe\x1b[2J",
                                     b"HTTP/1.1 401 no", b"HTTP/1.1 100 Continue"]))  # fmt: skip
        return line + b"\r\nContent-Length: 5\r\n\r\nhello", b"hello"
    return (good, body) if kind == "good" else (good[: draw(st.integers(0, len(good) - 1))], body)


class Http:
    name = "http"

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        self._sends = b""
        self._port = self._run(self._serve())

    def _run(self, work: Any) -> Any:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(15)

    async def _serve(self) -> int:
        async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            try:
                await reader.readuntil(b"\r\n\r\n")
                writer.write(self._sends)
                await writer.drain()
            except (OSError, asyncio.IncompleteReadError):
                pass
            finally:
                writer.close()

        self._server = await asyncio.start_server(answer, "127.0.0.1", 0)
        return int(self._server.sockets[0].getsockname()[1])

    def inputs(self) -> st.SearchStrategy[Any]:
        return _answers()

    def judge(self, value: tuple[bytes, bytes]) -> Verdict:
        self._sends, holds = value
        try:
            body = self._run(self._ask())
        except SampleError as error:
            if len(str(error)) > 10_000 or not str(error):
                raise Wrong(f"a message of {len(str(error))} characters") from error
            return "refused"
        if len(body) > len(self._sends):
            raise Wrong(f"{len(body)} bytes came of {len(self._sends)}")
        if body not in self._sends and body.replace(b"hello", b"") != b"":
            raise Wrong("a body that was not sent")
        return "taken"

    async def _ask(self) -> bytes:
        client = ServerClient("127.0.0.1", self._port, "key", keyed_path="/x")
        try:
            return await client.post("/x", {}, TIMEOUT)
        finally:
            await client.close()

    def close(self) -> None:
        self._loop.call_soon_threadsafe(self._server.close)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)
