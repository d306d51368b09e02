"""Requests in flight together at one engine: they share one watch over it and one verdict on it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any, Self

from roll_r3.strategies.base import GenerateResult


class Burst:
    """Requests from the first one to an idle engine until the last one has its result.

    Use it as a context manager, entered once per request.
    """

    def __init__(
        self, watch: Callable[[], Coroutine[Any, Any, None]], why_closed: Callable[[], Coroutine[Any, Any, str]]
    ) -> None:
        """
        Args:
            watch: runs while requests are in flight.
            why_closed: called once per burst; returns why the engine would not answer requests, or empty.
        """
        self._watch, self._ask_why_closed = watch, why_closed
        self._running = 0
        self._tasks: list[asyncio.Task[Any]] = []

    async def __aenter__(self) -> Self:
        if not self._running:
            self._requests, self._success = 0, False
            self._hold()
            self._closed = asyncio.create_task(self._ask_why_closed())
            self._tasks = [asyncio.create_task(self._watch()), self._closed]
        self._running += 1
        self._requests += 1
        return self

    async def __aexit__(self, *_: object) -> None:
        self._running -= 1
        self._judge()
        if not self._running:
            tasks = self._tasks
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def why_closed(self) -> str:
        """Return why the engine would not answer requests; empty if it would."""
        return await asyncio.shield(self._closed)

    def succeeded(self) -> None:
        """Record a request with a sample."""
        self._success = True
        self._release([])

    async def failures(self, result: GenerateResult) -> list[GenerateResult]:
        """Hold the result of a request without any sample until another one returns a sample, or all have failed.

        While it is held the engine gets nothing in its place: a broken engine fails fast, and would get everything.

        Returns:
            All such results, if the burst had several requests and none ever returned a sample: the engine is broken.
            One request is too little evidence.
        """
        self._held.append(result)
        verdict = self._verdict
        self._judge()
        return await asyncio.shield(verdict)

    def _judge(self) -> None:
        if len(self._held) >= self._running:
            self._release([] if self._success or self._requests == 1 else self._held)

    def _release(self, failures: list[GenerateResult]) -> None:
        if self._held:
            self._verdict.set_result(failures)
            self._hold()

    def _hold(self) -> None:
        """Hold failed requests from now on, until the next verdict."""
        self._held: list[GenerateResult] = []
        self._verdict: asyncio.Future[list[GenerateResult]] = asyncio.get_running_loop().create_future()
