"""Client of a judge's server; requests are repeated where this can help."""

from __future__ import annotations

import asyncio
import json
import os
import random
from typing import Any

import aiohttp

from roll_r3.config.findings.readable import readable
from roll_r3.config.rewards import JudgeConfig

_REPEATED = frozenset({408, 409, 429, *range(500, 600)})
_MAX_BYTES = 4 << 20
"""Largest accepted answer, bytes."""
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.5, 30.0
_SHOWN = 300


class JudgeError(Exception):
    """Error: the judge gave no verdict. Its text never holds the key."""


class _RepeatableError(JudgeError):
    """Error worth another try."""

    def __init__(self, text: str, pause_s: float | None = None) -> None:
        """
        Args:
            pause_s: pause asked for by the server.
        """
        super().__init__(text)
        self.pause_s = pause_s


class ChatClient:
    """HTTP session with one judge. Create, use and close it in one event loop."""

    def __init__(self, judge: JudgeConfig) -> None:
        """
        Raises:
            JudgeError: the environment has no key.
        """
        self._judge = judge
        self._key = os.environ.get(judge.api_key_env, "") if judge.api_key_env else ""
        if judge.api_key_env and not self._key:
            raise JudgeError(f"the environment variable {judge.api_key_env} is not set")
        self._url = judge.base_url.rstrip("/") + "/chat/completions"
        self._open = asyncio.Semaphore(judge.max_concurrency)
        self._session = aiohttp.ClientSession(
            headers={"Authorization": f"Bearer {self._key}"} if self._key else None,
            timeout=aiohttp.ClientTimeout(total=judge.timeout),
            connector=aiohttp.TCPConnector(limit=0),
        )

    async def close(self) -> None:
        await self._session.close()

    async def verdict(self, question: str) -> str:
        """Return the judge's text.

        Raises:
            JudgeError: no verdict after all repetitions.
        """
        body = self._judge.extra_body | {
            "model": self._judge.model,
            "messages": [{"role": "user", "content": question}],
            "max_tokens": self._judge.max_tokens,
            "temperature": self._judge.temperature,
        }
        pause = _FIRST_PAUSE_S
        for repetition in range(self._judge.retries + 1):
            try:
                async with self._open:
                    return self._text_of(await self._answer(body))
            except _RepeatableError as error:
                if repetition == self._judge.retries:
                    raise JudgeError(f"{error}, also after {repetition} repetitions") from None
                await asyncio.sleep(min(_LONGEST_PAUSE_S, error.pause_s or pause * random.uniform(0.5, 1.0)))
                pause = min(_LONGEST_PAUSE_S, 2 * pause)
        raise AssertionError("the last repetition returns or raises")

    async def _answer(self, body: dict[str, Any]) -> bytes:
        """Send one request; return the body of the answer."""
        try:
            async with self._session.post(self._url, json=body, allow_redirects=False) as response:
                content = await self._read(response)
                status, pause = response.status, response.headers.get("Retry-After", "")
        except TimeoutError:
            raise _RepeatableError(f"no answer within {self._judge.timeout:g} s") from None
        except (aiohttp.ClientError, ValueError) as error:
            raise _RepeatableError(f"the connection failed: {self._shown(str(error))}") from None
        if status == 200:
            return content
        text = f"the server answered {status}: {self._shown(content.decode(errors='replace'))}"
        if status in _REPEATED:
            raise _RepeatableError(text, float(pause) if pause.isdigit() else None)
        raise JudgeError(text)

    async def _read(self, response: aiohttp.ClientResponse) -> bytes:
        content = bytearray()
        async for chunk in response.content.iter_any():
            content += chunk
            if len(content) > _MAX_BYTES:
                raise JudgeError(f"the answer has more than {_MAX_BYTES} bytes")
        return bytes(content)

    def _shown(self, text: str) -> str:
        """Return a text for messages: short, printable, without the key."""
        return readable(text.replace(self._key, "[key]")[:_SHOWN] if self._key else text[:_SHOWN])

    def _text_of(self, content: bytes) -> str:
        """Return the text of the first choice; empty if it is null.

        Raises:
            _RepeatableError: the answer has another form.
        """
        try:
            text = json.loads(content)["choices"][0]["message"]["content"]
        except (ValueError, RecursionError, LookupError, TypeError):
            text = 0
        if text is not None and not isinstance(text, str):
            shown = self._shown(content.decode(errors="replace"))
            raise _RepeatableError(f"the answer is no chat completion: {shown}")
        return text or ""
