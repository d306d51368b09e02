"""Whether a server still does anything. No engine is named here."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable

_QUESTIONS = 3
"""A server that is taken for hung let this many questions in a row go unanswered: else one that was asked just before
this process itself was stopped for a while would be taken for it."""
_PAUSE_S = 5.0
"""Between an answer and the next question."""
_REFUSED_S = 1.0
"""Between a refusal, which may come at once, and the next question."""

Probe = Callable[[float], Awaitable[bool]]
"""Asks for a sign of life and waits so many seconds for it. The part of the server that generates must give it, between
any two of its batches: then an engine that works is never silent for longer than one batch takes, however much it has
to do."""
Sleep = Callable[[float], Awaitable[None]]


async def answers(
    probe: Probe, seconds: float, *, now: Callable[[], float] = time.monotonic, sleep: Sleep = asyncio.sleep
) -> bool:
    """True with the first sign of life; False after `seconds` without any, at the latest two thirds of it later."""
    share = seconds / _QUESTIONS
    began, asked = now(), 0
    while asked < _QUESTIONS or now() - began < seconds:
        if await probe(share):
            return True
        asked += 1
        await sleep(min(_REFUSED_S, share))
    return False


async def until_silent(
    probe: Probe, seconds: float, *, now: Callable[[], float] = time.monotonic, sleep: Sleep = asyncio.sleep
) -> None:
    """Return once the server gave no sign of life for `seconds`; as long as it does, never."""
    while await answers(probe, seconds, now=now, sleep=sleep):
        await sleep(min(_PAUSE_S, seconds / _QUESTIONS))
