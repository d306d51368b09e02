"""The requests that a rollout sends to its server, over one HTTP session."""

from __future__ import annotations

from contextlib import AbstractAsyncContextManager
from typing import Any

import aiohttp

from roll_r3.config.readable import readable
from roll_r3.engines.sampling import SampleError

_PLAIN_ANSWER = 64 << 20
"""Bytes that an answer without routes may have."""


class UnreachableError(SampleError):
    """No connection: the server is not up yet, is gone, or dropped the line."""


class ServerClient:
    """Must be made and closed in the event loop that uses it."""

    def __init__(self, host: str, port: int, api_key: str, *, keyed_path: str) -> None:
        """
        Args:
            keyed_path: something cheap to GET, which the server answers to whoever has the key and to nobody else.
        """
        self._keyed_path = keyed_path
        authority = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
        self._base = f"http://{authority}"
        self._session = aiohttp.ClientSession(
            headers={"Authorization": f"Bearer {api_key}", "Accept-Encoding": "identity"},
            auto_decompress=False,  # what is small as it comes could fill the memory when it is unpacked
            # A fresh connection per request: the server drops idle ones after 5 s, and a request that is just being
            # written to a dropped one fails.
            connector=aiohttp.TCPConnector(limit=0, force_close=True),
        )

    async def healthy(self, timeout_s: float) -> bool:
        """True once the server can generate, and knows the key: another server on the same port does not."""
        try:
            for path in ("/health", self._keyed_path):  # the first may ask for no key
                async with self._get(path, timeout_s) as response:
                    if response.status != 200:
                        return False
        except (aiohttp.ClientError, TimeoutError):
            return False
        return True

    async def alive(self, timeout_s: float) -> bool:
        """True if the part of the server that generates answers, without being asked to generate anything."""
        try:
            async with self._get(self._keyed_path, timeout_s) as response:
                return response.status == 200
        except (aiohttp.ClientError, TimeoutError):
            return False

    async def get(self, path: str, timeout_s: float) -> bytes:
        """The body of the answer.

        Raises:
            UnreachableError: no connection, or it broke.
            SampleError: an HTTP error, no answer in time, or one that is too large.
        """
        return await self._body(self._get(path, timeout_s), timeout_s, _PLAIN_ANSWER)

    def _get(self, path: str, timeout_s: float) -> AbstractAsyncContextManager[aiohttp.ClientResponse]:
        return self._session.get(self._base + path, timeout=_timeout(timeout_s), allow_redirects=False)

    async def post(
        self, path: str, request: dict[str, Any], timeout_s: float, most_bytes: int = _PLAIN_ANSWER
    ) -> bytes:
        """As `get`, of a request with a body.

        Args:
            most_bytes: an answer with more is refused, and no more of it is read than that.
        """
        answering = self._session.post(
            self._base + path, json=request, timeout=_timeout(timeout_s), allow_redirects=False
        )
        return await self._body(answering, timeout_s, most_bytes)

    async def _body(
        self, answering: AbstractAsyncContextManager[aiohttp.ClientResponse], timeout_s: float, most_bytes: int
    ) -> bytes:
        try:
            async with answering as response:
                chunks, num_bytes = [], 0
                async for chunk in response.content.iter_any():
                    chunks.append(chunk)
                    num_bytes += len(chunk)
                    if num_bytes > most_bytes:
                        raise SampleError(
                            f"the answer has more than {most_bytes} bytes, which is more than what was asked for takes"
                        )
                body = b"".join(chunks)
                status = response.status
        except TimeoutError as error:
            raise SampleError(f"no answer within {timeout_s:g} s (strategy_config.request_timeout)") from error
        except aiohttp.ClientError as error:
            raise UnreachableError(f"the connection to the server failed: {readable(error)}") from error
        if status != 200:
            raise SampleError(f"the server answered {status}: {readable(body[:500].decode(errors='replace'))}")
        return body

    async def close(self) -> None:
        await self._session.close()


def _timeout(seconds: float) -> aiohttp.ClientTimeout:
    return aiohttp.ClientTimeout(total=seconds)
