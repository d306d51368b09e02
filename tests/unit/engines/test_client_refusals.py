"""Server answers refused by the rollout's client, below the JSON."""

from __future__ import annotations

import asyncio
import gzip
from collections.abc import Awaitable, Callable
from typing import TypeVar

import pytest

from roll_r3.engines.client import ServerClient
from roll_r3.engines.sample import SampleError

T = TypeVar("T")


def ask(answer: bytes) -> bytes:
    """Return the client's result for a fixed answer of the server."""
    return asked(answer, lambda client: client.get("/x", 20.0))


def asked(answer: bytes, question: Callable[[ServerClient], Awaitable[T]], *, keep: float = 0.0) -> T:
    """Return the result of a client's question.

    Args:
        keep: seconds that the server waits before it answers.
    """

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        await asyncio.sleep(keep)
        writer.write(answer)
        await writer.drain()
        writer.close()

    async def run() -> T:
        server = await asyncio.start_server(serve, "127.0.0.1", 0)
        client = ServerClient("127.0.0.1", server.sockets[0].getsockname()[1], "key", keyed_path="/x")
        try:
            return await question(client)
        finally:
            await client.close()
            server.close()

    return asyncio.run(run())


def test_an_answer_is_not_unpacked() -> None:
    bomb = gzip.compress(bytes(50 << 20))
    head = f"HTTP/1.1 200 OK\r\nContent-Encoding: gzip\r\nContent-Length: {len(bomb)}\r\n\r\n"
    assert ask(head.encode() + bomb) == bomb


def test_nobody_is_sent_elsewhere() -> None:
    with pytest.raises(SampleError, match="the server answered 302"):
        ask(b"HTTP/1.1 302 Found\r\nLocation: http://127.0.0.1:1/x\r\nContent-Length: 0\r\n\r\n")


def test_a_message_can_be_shown_whatever_came() -> None:
    for answer in (b"HTTP/1.1 500 no\r\n\r\n\x1b[2J\xff\n" * 1000, b"x" * 20_000 + b"\r\n\r\n"):
        with pytest.raises(SampleError) as refused:
            ask(answer)
        assert str(refused.value).isprintable() and len(str(refused.value)) < 4000


def test_only_an_answer_in_time_is_a_sign_of_life() -> None:
    yes = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}"
    assert asked(yes, lambda client: client.alive(20.0))
    assert not asked(b"HTTP/1.1 503 busy\r\nContent-Length: 0\r\n\r\n", lambda client: client.alive(20.0))
    assert not asked(b"", lambda client: client.alive(20.0)), "the line was dropped"
    assert not asked(yes, lambda client: client.alive(0.05), keep=1.0)
