"""HTTP client of one server, for the engine's own requests."""

from __future__ import annotations

from contextlib import AbstractAsyncContextManager
from typing import Any

import aiohttp

from roll_r3.config.findings.readable import readable
from roll_r3.engines.sample import SampleError

_PLAIN_ANSWER = 64 << 20
"""Largest answer without routes, in bytes."""


class UnreachableError(SampleError):
    """No connection: the server is not up yet, is gone, or closed it."""


class ServerClient:
    """One HTTP session. Create and close it in the event loop of its requests."""

    def __init__(self, host: str, port: int, api_key: str, *, keyed_path: str) -> None:
        """
        Args:
            keyed_path: path of a cheap GET, answered only to holders of the key.
        """
        self._keyed_path = keyed_path
        self.port = port
        authority = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
        self._base = f"http://{authority}"
        self._session = aiohttp.ClientSession(
            headers={"Authorization": f"Bearer {api_key}", "Accept-Encoding": "identity"},
            auto_decompress=False,  # a small compressed answer could unpack to more than the memory
            # A fresh connection per request: the server closes idle ones after 5 s, and a request sent just then
            # fails.
            connector=aiohttp.TCPConnector(limit=0, force_close=True),
        )

    async def healthy(self, timeout_s: float) -> bool:
        """Return True once the server can generate and accepts the key, unlike another server on the same port."""
        try:
            for path in ("/health", self._keyed_path):  # the first may need no key
                async with self._get(path, timeout_s) as response:
                    if response.status != 200:
                        return False
        except (aiohttp.ClientError, TimeoutError):
            return False
        return True

    async def alive(self, timeout_s: float) -> bool:
        """Return True if the generating part of the server answers. Nothing is generated."""
        try:
            async with self._get(self._keyed_path, timeout_s) as response:
                return response.status == 200
        except (aiohttp.ClientError, TimeoutError):
            return False

    async def get(self, path: str, timeout_s: float) -> bytes:
        """Return the body of the answer.

        Raises:
            UnreachableError: no connection, or a broken one.
            SampleError: an HTTP error, a timeout, or a too large answer.
        """
        return await self._body(self._get(path, timeout_s), timeout_s, _PLAIN_ANSWER)

    def _get(self, path: str, timeout_s: float) -> AbstractAsyncContextManager[aiohttp.ClientResponse]:
        return self._session.get(self._base + path, timeout=_timeout(timeout_s), allow_redirects=False)

    async def post(
        self, path: str, request: dict[str, Any], timeout_s: float, most_bytes: int = _PLAIN_ANSWER
    ) -> bytes:
        """Send a JSON body; the rest is as in `get`.

        Args:
            most_bytes: limit of the answer; reading stops there.
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
                        raise SampleError(f"the answer has more than {most_bytes} bytes, the limit for this request")
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
