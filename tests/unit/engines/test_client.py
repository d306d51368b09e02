"""A server's answer is read up to the largest possible size of a valid answer."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable

import pytest
from aiohttp import web

from roll_r3.config.sampling_settings import Sampling
from roll_r3.engines.client import ServerClient
from roll_r3.engines.sample import Asked, SampleError, SampleRequest
from roll_r3.models.facts import ModelFacts, read_facts
from roll_r3.models.tiny import make_tiny_checkpoint

CHUNK = b"x" * 65536


def answered(handler: Callable[[web.Request], Awaitable[web.StreamResponse]], most_bytes: int) -> bytes:
    """Return the client's result for a server's answer."""

    async def scenario() -> bytes:
        app = web.Application()
        app.router.add_post("/generate", handler)
        runner = web.AppRunner(app)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        assert site._server is not None
        port = site._server.sockets[0].getsockname()[1]  # type: ignore[attr-defined]
        client = ServerClient("127.0.0.1", port, "key", keyed_path="/")
        try:
            return await client.post("/generate", {}, 30.0, most_bytes)
        finally:
            await client.close()
            await runner.cleanup()

    return asyncio.run(scenario())


def test_an_answer_of_just_the_size_is_whole() -> None:
    async def handler(request: web.Request) -> web.Response:
        return web.Response(body=b"y" * 200_000)

    assert answered(handler, 200_000) == b"y" * 200_000
    with pytest.raises(SampleError, match="more than 199999 bytes"):
        answered(handler, 199_999)


def test_an_answer_without_end_is_left() -> None:
    sent = 0

    async def handler(request: web.Request) -> web.StreamResponse:
        nonlocal sent
        response = web.StreamResponse()
        await response.prepare(request)
        while sent < 1 << 30:
            await response.write(CHUNK)
            sent += len(CHUNK)
        return response

    with pytest.raises(SampleError, match="more than 1000000 bytes"):
        answered(handler, 1_000_000)
    assert sent < 1 << 25, "what sockets hold, and no more"


@pytest.fixture(scope="module")
def facts(tmp_path_factory: pytest.TempPathFactory) -> ModelFacts:
    return read_facts(make_tiny_checkpoint(tmp_path_factory.mktemp("tiny")))


@pytest.mark.parametrize(("first_row", "rows"), [(0, 1099), (64, 1035)])
def test_the_longest_answer_fits_and_little_more(facts: ModelFacts, first_row: int, rows: int) -> None:
    asked = Asked(SampleRequest((1,) * 100, "s", 0, Sampling(1000), first_row=first_row), 0)
    routes = "A" * (4 * -(-rows * facts.num_layers * facts.top_k * 4 // 3))
    entries = [(-123.45678901234567, 151_935, "Donaudampfschifffahrt")] * 1000
    body = {"output_ids": [151_935] * 1000, "meta_info": {"output_token_logprobs": entries, "routed_experts": routes}}
    most = asked.most_bytes(facts, 0)
    assert len(json.dumps(body)) <= most <= len(json.dumps(body)) + (6 << 20)
    plain = Asked(SampleRequest((1,) * 100, "s", 0, Sampling(1000), record_routes=False), 0)
    assert plain.most_bytes(facts, 0) < most - len(routes) + 8
    sets = [[151_935] * 2 * 20] * 1000  # with as many tokens as likely as the last
    assert 0 <= asked.most_bytes(facts, 20) - most - len(json.dumps(sets)) < 100_000
