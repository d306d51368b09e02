"""The requests that a rollout sends to its server, over one HTTP session."""

from __future__ import annotations

from contextlib import AbstractAsyncContextManager
from typing import Any

import aiohttp

from roll_r3.strategies.rollout.answers import readable
from roll_r3.strategies.rollout.sampling import SampleError


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

    async def get(self, path: str, timeout_s: float) -> bytes:
        """The body of the answer.

        Raises:
            UnreachableError: no connection, or it broke.
            SampleError: an HTTP error, or no answer in time.
        """
        return await self._body(self._get(path, timeout_s), timeout_s)

    async def post(self, path: str, request: dict[str, Any], timeout_s: float) -> bytes:
        """As `get`, of a request with a body."""
        url = self._base + path
        asking = self._session.post(url, json=request, timeout=_timeout(timeout_s), allow_redirects=False)
        return await self._body(asking, timeout_s)

    def _get(self, path: str, timeout_s: float) -> AbstractAsyncContextManager[aiohttp.ClientResponse]:
        return self._session.get(self._base + path, timeout=_timeout(timeout_s), allow_redirects=False)

    async def _body(self, answering: AbstractAsyncContextManager[aiohttp.ClientResponse], timeout_s: float) -> bytes:
        try:
            async with answering as response:
                body = await response.read()
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
