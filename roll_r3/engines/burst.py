"""Requests that an engine has under way together: they share one watch over the engine and one verdict on it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any, Self

from roll_r3.strategies.base import GenerateResult


class Burst:
    """The requests from the first one to an idle engine until the last one has its result.

    Use it as a context manager, entered once per request.
    """

    def __init__(self, watch: Callable[[], Coroutine[Any, Any, None]], closed: Callable[[], Coroutine[Any, Any, str]]):
        """
        Args:
            watch: runs while requests are under way.
            closed: asked once per burst: why the engine would not answer requests; empty when it would.
        """
        self._watch, self._ask_closed = watch, closed
        self._running = 0
        self._tasks: list[asyncio.Task[Any]] = []

    async def __aenter__(self) -> Self:
        if not self._running:
            self._asked, self._brought = 0, False
            self._fruitless: list[GenerateResult] = []
            self._changed = asyncio.Event()
            self._closed = asyncio.create_task(self._ask_closed())
            self._tasks = [asyncio.create_task(self._watch()), self._closed]
        self._running += 1
        self._asked += 1
        return self

    async def __aexit__(self, *_: object) -> None:
        self._running -= 1
        self._changed.set()
        if not self._running:
            tasks = self._tasks
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def closed(self) -> str:
        return await asyncio.shield(self._closed)

    def brought(self) -> None:
        """Note that a sample came."""
        self._brought = True
        self._changed.set()

    async def brought_nothing(self, result: GenerateResult) -> list[GenerateResult]:
        """Hold the result of a request of which no sample came until that says something about the engine.

        Returns:
            All such results, where the engine was asked for several prompts and none brought a sample: it is broken.
            Of a single prompt that would be too little to say so. Empty as soon as another request brings a sample.
        """
        self._fruitless.append(result)
        self._changed.set()
        while not self._brought and len(self._fruitless) < self._running:
            self._changed.clear()
            await self._changed.wait()
        return [] if self._brought or self._asked == 1 else self._fruitless
