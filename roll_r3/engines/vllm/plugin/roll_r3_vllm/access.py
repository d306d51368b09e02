"""Check of the key on every path: vLLM's own check does not cover weight updates."""

from __future__ import annotations

import hmac
from collections.abc import Awaitable, Callable
from typing import Any

KEY: bytes = b""
"""Key of the server, set by its main program before it serves."""


class RequireKey:
    """ASGI middleware: answer every request without the key with 401."""

    def __init__(self, app: Callable[..., Awaitable[None]]) -> None:
        assert KEY, "the main program sets the key first"
        self._app = app

    async def __call__(self, scope: dict[str, Any], receive: Any, send: Any) -> None:
        if scope["type"] == "lifespan" or self._knows_the_key(scope):
            await self._app(scope, receive, send)
        elif scope["type"] == "http":
            await send({"type": "http.response.start", "status": 401, "headers": []})
            await send({"type": "http.response.body", "body": b"wrong key"})
        else:
            await send({"type": "websocket.close", "code": 1008})

    @staticmethod
    def _knows_the_key(scope: dict[str, Any]) -> bool:
        given = [value for name, value in scope["headers"] if name == b"authorization"]
        return len(given) == 1 and hmac.compare_digest(given[0], b"Bearer " + KEY)
