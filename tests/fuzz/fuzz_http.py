"""Hostile HTTP answers, below the JSON: reactions of the rollout's client to a lying server."""

from __future__ import annotations

import asyncio
import gzip
import threading
import zlib
from typing import Any

from fuzz_harness import Verdict, Wrong, mutated
from hypothesis import strategies as st

from roll_r3.engines.client import ServerClient
from roll_r3.engines.sample import SampleError

TIMEOUT = 0.5
BOMB = gzip.compress(bytes(300 << 20), 1)
"""A few hundred kilobytes that unpack to 300 MiB."""
_LENGTHS = ["0", "-1", "5", "9" * 30, str(1 << 62), "1e3", "", "0x5", "5, 6", "+5"]
_ENCODINGS = ["gzip", "deflate", "br", "zstd", "x-unknown", "identity", "gzip, gzip"]
_SIZES = [b"5", b"-5", b"5;x=" + b"y" * 9000, b"FFFFFFFFFFFFFFFFFF", b"zz", b"0", b""]
_HEADERS = [b"A: " + b"b" * 100_000, b"A: b\r\n" * 20_000, b"\0: \0", b": x", b"A\r\n b", b"A: \xff"]
_STATUS = [
    b"HTTP/1.1 999 ", b"HTTP/9.9 200 OK", b"HTTP/1.1 200", b"hello", b"HTTP/1.1 1e3 OK", b"", b"HTTP/1.1 401 no",
    b"HTTP/1.1 302 F\r\nLocation: http://127.0.0.1:1/x", b"HTTP/1.1 500 \xff\xfe\x1b[2J", b"HTTP/1.1 100 Continue",
]  # fmt: skip


@st.composite
def _answers(draw: st.DrawFn) -> bytes:
    """Draw the bytes sent by the server."""
    body = draw(st.sampled_from([b"", b"{}", b"hello", b"x" * 5000]))
    kind = draw(
        st.sampled_from(["good", "mutated", "length", "bomb", "encoding", "chunks", "headers", "status", "cut"])
    )
    if kind == "length":
        return _answer(body, length=draw(st.sampled_from(_LENGTHS)))
    if kind == "bomb":
        return _answer(BOMB, "Content-Encoding: gzip")
    if kind == "encoding":
        data = draw(st.sampled_from([gzip.compress(body), zlib.compress(body), body]))
        return _answer(data, f"Content-Encoding: {draw(st.sampled_from(_ENCODINGS))}")
    if kind == "chunks":
        sizes = draw(st.lists(st.sampled_from(_SIZES), max_size=3))
        chunks = b"".join(size + b"\r\nhello\r\n" for size in sizes)
        return b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n" + chunks + b"0\r\n\r\n"
    if kind == "headers":
        return b"HTTP/1.1 200 OK\r\n" + draw(st.sampled_from(_HEADERS)) + b"\r\n\r\n"
    if kind == "status":
        return draw(st.sampled_from(_STATUS)) + b"\r\nContent-Length: 5\r\n\r\nhello"
    good = _answer(body)
    if kind == "mutated":
        return draw(mutated(good))
    return good if kind == "good" else good[: draw(st.integers(0, len(good) - 1))]


def _answer(body: bytes, header: str = "A: b", length: str | None = None) -> bytes:
    head = f"HTTP/1.1 200 OK\r\n{header}\r\nContent-Length: {len(body) if length is None else length}\r\n\r\n"
    return head.encode() + body


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

    def judge(self, value: bytes) -> Verdict:
        self._sends = value
        try:
            body = self._run(self._ask())
        except SampleError as error:
            if b"\r\nLocation:" in self._sends and "answered 302" not in str(error):
                raise Wrong("it went where the server sent it") from error
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
